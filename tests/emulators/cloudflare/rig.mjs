// Runs a Worker under Miniflare, behind a front that is slow, refuses and cuts on demand.
// Told by a line of JSON on stdin, each time it changes: {latency, faults, cut}. Ends when stdin does.
import { build } from "esbuild";
import { createServer, request } from "node:http";
import { createInterface } from "node:readline";
import { fetch, Log, LogLevel, Miniflare, Response } from "miniflare";
import { serveRpc } from "./rpc.mjs";

const { entry, bindings, internet, verbose } = JSON.parse(process.argv[2]);

const built = await build({
  entryPoints: [entry],
  bundle: true,
  format: "esm",
  target: "es2022",
  conditions: ["workerd", "worker", "browser"],
  external: ["cloudflare:*", "node:*"],
  write: false,
  logLevel: "error",
});
// An internet in which every host says what it was asked for. Without it, fetches of the Worker go where they say.
const outside = (request) =>
  request.url.startsWith(bindings.CONTROL) ? fetch(request) : new Response(`reached ${request.url}`);
const durable = (className) => ({ className, useSQLite: true });
const miniflare = new Miniflare({
  name: "rig",
  modules: [{ type: "ESModule", path: "worker.mjs", contents: built.outputFiles[0].text }],
  compatibilityDate: "2026-04-01",
  compatibilityFlags: ["nodejs_compat"],
  durableObjects: { Sandbox: durable("Sandbox"), WarmPool: durable("WarmPool") },
  bindings: bindings.SANDBOX_TRANSPORT === "rpc" ? { ...bindings, RPC: await serveRpc(bindings.CONTROL) } : bindings,
  ...(internet ? { outboundService: outside } : {}),
  cf: false,
  log: new Log(verbose ? LogLevel.DEBUG : LogLevel.NONE),
  handleRuntimeStdio: (out, err) => {
    if (verbose) {
      out.pipe(process.stderr);
      err.pipe(process.stderr);
    } else {
      out.resume();
      err.resume();
    }
  },
});
const inner = await miniflare.ready;

let state = { latency: 0, faults: [] };
const open = new Set();

const front = createServer(async (incoming, outgoing) => {
  open.add(outgoing);
  outgoing.on("close", () => open.delete(outgoing));
  if (state.latency > 0) await new Promise((resolve) => setTimeout(resolve, state.latency * 1000));
  const fault = state.faults.find(({ path }) => incoming.url.includes(path));
  if (fault !== undefined) {
    state.faults.splice(state.faults.indexOf(fault), 1);
    incoming.resume();
    outgoing.writeHead(fault.status, fault.headers).end(fault.body);
    return;
  }
  const { method, url, headers } = incoming;
  const onward = request({ host: inner.hostname, port: inner.port, method, path: url, headers }, (answer) => {
    outgoing.writeHead(answer.statusCode, answer.headers);
    answer.pipe(outgoing);
    answer.on("error", () => outgoing.destroy());
  });
  onward.on("error", () => outgoing.destroy());
  outgoing.on("close", () => onward.destroy());
  incoming.pipe(onward);
});
let connections = 0;
front.on("connection", () => connections++);
front.listen(0, "127.0.0.1", () => console.log(JSON.stringify({ url: `http://127.0.0.1:${front.address().port}` })));

createInterface({ input: process.stdin })
  .on("line", (line) => {
    const { cut, ...rest } = JSON.parse(line);
    Object.assign(state, rest);
    if (cut) for (const outgoing of open) outgoing.destroy();
    console.log(JSON.stringify({ connections }));
  })
  .on("close", async () => {
    await miniflare.dispose();
    process.exit(0);
  });
