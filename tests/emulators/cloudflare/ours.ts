/** The Worker of `examples/cloudflare`, with containers of our own, and a way to ask what those may reach. */
import worker, { ContainerProxy, type Env, Sandbox as Deployed, WarmPool } from "../example/src/index";
import { container, type Outbound } from "./container";

export { ContainerProxy, WarmPool };

export class Sandbox extends Deployed {
  private readonly platform: ReturnType<typeof container>;

  constructor(ctx: DurableObjectState, env: never) {
    const platform = container(ctx.id.toString(), env);
    Object.defineProperty(ctx, "container", { value: platform });
    super(ctx, env);
    this.platform = platform;
  }

  async outbound(url: string): Promise<Outbound> {
    return await this.platform.outbound(url);
  }
}

export default {
  ...worker,
  async fetch(request, env, ctx): Promise<Response> {
    const { pathname, searchParams } = new URL(request.url);
    if (pathname !== "/rig/outbound") return await worker.fetch(request, env, ctx);
    const namespace = env.Sandbox as unknown as DurableObjectNamespace<Sandbox>;
    const sandbox = namespace.get(namespace.idFromString(searchParams.get("container") ?? ""));
    return Response.json(await sandbox.outbound(searchParams.get("url") ?? ""));
  },
} satisfies ExportedHandler<Env>;
