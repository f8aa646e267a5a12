/** The Worker of `examples/cloudflare`, with containers of our own. */
import worker, { ContainerProxy, Sandbox as Deployed, WarmPool } from "../example/src/index";
import { container } from "./container";

export { ContainerProxy, WarmPool };

export class Sandbox extends Deployed {
  constructor(ctx: DurableObjectState, env: never) {
    Object.defineProperty(ctx, "container", { value: container(ctx.id.toString(), env) });
    super(ctx, env);
  }
}

export default worker;
