/** What the platform gives a Durable Object as `ctx.container`, made of a control server on loopback. */

type Env = { CONTROL: string };

export function container(id: string, env: Env): unknown {
  const base = `${env.CONTROL}/containers/${id}`;
  let running = false;
  let started: Promise<void> = Promise.resolve();

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
    start(options: unknown) {
      running = true;
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
          return await fetch(`${base}/port/${port}${pathname}${search}`, new Request(request.url, request));
        },
      };
    },
    async interceptOutboundHttp() {},
    async interceptOutboundHttps() {},
    async interceptAllOutboundHttp() {},
  };
}
