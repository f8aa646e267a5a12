/** Cloudflare's own bridge and nothing else, as its template deploys it, with containers of our own. */
import { ContainerProxy, Sandbox as Vendor } from "@cloudflare/sandbox";
import { bridge, WarmPool } from "@cloudflare/sandbox/bridge";
import { container } from "./container";

export { ContainerProxy, WarmPool };

export class Sandbox extends Vendor {
  constructor(ctx: DurableObjectState, env: never) {
    Object.defineProperty(ctx, "container", { value: container(ctx.id.toString(), env) });
    super(ctx as never, env);
  }
}

export default bridge({
  async fetch(): Promise<Response> {
    return new Response("OK");
  },
});
