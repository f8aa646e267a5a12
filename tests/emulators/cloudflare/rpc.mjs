// The server in a container as the SDK's `rpc` transport calls it: capnweb over a WebSocket. It passes on to the routes
// of the `http` transport, and back what they answer.
import { newWebSocketRpcSession, RpcTarget } from "capnweb";
import { createServer } from "node:http";
import { WebSocketServer } from "ws";

class Commands extends RpcTarget {
  constructor(base) {
    super();
    this.base = base;
  }
  async execute(command, _session, options) {
    return await (await post(`${this.base}/execute`, { command, ...options })).json();
  }
  async executeStream(command, _session, options) {
    return (await post(`${this.base}/execute/stream`, { command, ...options })).body;
  }
}

class Files extends RpcTarget {
  constructor(base) {
    super();
    this.base = base;
  }
  async writeFile(path, content, _session, options) {
    return await (await post(`${this.base}/write`, { path, content, ...options })).json();
  }
}

class Utils extends RpcTarget {
  async getVersion() {
    return "0.12.10";
  }
  async ping() {
    return "pong";
  }
}

class Api extends RpcTarget {
  constructor(base) {
    super();
    this.base = base;
  }
  get commands() {
    return new Commands(this.base);
  }
  get files() {
    return new Files(this.base);
  }
  get utils() {
    return new Utils();
  }
}

async function post(url, body) {
  const response = await fetch(url, { method: "POST", body: JSON.stringify(body) });
  if (!response.ok) throw new Error(await response.text());
  return response;
}

/** Serve `/containers/ID/rpc` for the control server at `control`; return the server's address. */
export async function serveRpc(control) {
  const server = createServer();
  const sockets = new WebSocketServer({ server, maxPayload: 16 * 1024 * 1024 });
  sockets.on("connection", (socket, request) => {
    const [, , id] = request.url.split("/");
    newWebSocketRpcSession(socket, new Api(`${control}/containers/${id}/port/3000/api`));
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  return `http://127.0.0.1:${server.address().port}`;
}
