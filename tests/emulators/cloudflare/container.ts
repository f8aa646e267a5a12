/** What the platform gives a Durable Object as `ctx.container`, made of a control server on loopback. */

type Env = { CONTROL: string; RPC?: string };

export type Outbound = { by: string; status?: number; text?: string };

export function container(id: string, env: Env) {
  const base = `${env.CONTROL}/containers/${id}`;
  let running = false;
  let started: Promise<void> = Promise.resolve();
  let open = false;
  const http = new Map<string, Fetcher>();
  const https = new Map<string, Fetcher>();

  async function start(options: unknown): Promise<void> {
    const response = await fetch(`${base}/start`, { method: "POST", body: JSON.stringify(options) });
    const said = await response.text();
    if (!response.ok) {
      running = false;
      throw new Error(said);
    }
  }

  return {
    get running() {
      return running;
    },
    start(options: { enableInternet?: boolean }) {
      running = true;
      open = options.enableInternet === true;
      started = start(options);
      started.catch(() => undefined);
    },
    async monitor() {
      await started;
      await (await fetch(`${base}/wait`)).text();
      running = false;
    },
    async destroy() {
      await (await fetch(base, { method: "DELETE" })).text();
      running = false;
    },
    signal(number: number) {
      fetch(`${base}/signal/${number}`, { method: "POST" }).catch(() => undefined);
    },
    getTcpPort(port: number) {
      return {
        async fetch(input: RequestInfo, init?: RequestInit): Promise<Response> {
          await started;
          const request = new Request(input, init);
          const { pathname, search } = new URL(request.url);
          if (pathname === "/rpc" && env.RPC !== undefined) {
            return await fetch(`${env.RPC}/containers/${id}/rpc`, { headers: { Upgrade: "websocket" } });
          }
          return await fetch(`${base}/port/${port}${pathname}${search}`, new Request(request.url, request));
        },
      };
    },
    async interceptOutboundHttp(host: string, fetcher: Fetcher) {
      http.set(host, fetcher);
    },
    async interceptOutboundHttps(host: string, fetcher: Fetcher) {
      https.set(host, fetcher);
    },
    async interceptAllOutboundHttp(fetcher: Fetcher) {
      http.set("*", fetcher);
    },
    /** What becomes of a request that a program in the container makes. */
    async outbound(url: string): Promise<Outbound> {
      const { protocol, hostname } = new URL(url);
      const interceptors = protocol === "https:" ? https : http;
      const fetcher = interceptors.get(hostname) ?? interceptors.get("*");
      if (fetcher === undefined) return { by: open ? "internet" : "nobody" };
      const response = await fetcher.fetch(url);
      return { by: "worker", status: response.status, text: await response.text() };
    },
  };
}
