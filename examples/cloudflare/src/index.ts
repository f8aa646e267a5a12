/**
 * The Worker that mabridge's `cloudflare` provider speaks with: Cloudflare's own bridge, and beside it a register of
 * the sandboxes that mabridge made, which the bridge has none of.
 *
 * With the register a sandbox is never made by accident (to the bridge alone, any request about an id starts a
 * container), it is removed at its deadline even if every worker is dead, and it can be listed, so it can be reaped.
 */
import { ContainerProxy, Sandbox as VendorSandbox } from "@cloudflare/sandbox";
import { bridge, WarmPool as VendorWarmPool } from "@cloudflare/sandbox/bridge";

export { ContainerProxy };

export interface Env {
  Sandbox: DurableObjectNamespace<Sandbox>;
  WarmPool: DurableObjectNamespace<WarmPool>;
  /** Whoever knows it can run commands here. Set with `wrangler secret put SANDBOX_API_KEY`. */
  SANDBOX_API_KEY?: string;
  /** "true" lets the sandboxes reach the whole internet. */
  ENABLE_INTERNET?: string;
  /** Hosts that the sandboxes may reach all the same, with commas between. */
  ALLOWED_HOSTS?: string;
  [name: string]: unknown;
}

/** What is remembered of a sandbox. Times are milliseconds since the epoch. */
interface Entry {
  labels: Record<string, string>;
  created: number;
  deadline: number;
  container: string;
}

interface Listed {
  id: string;
  labels: Record<string, string>;
  created: number;
  deadline: number;
}

interface Page {
  sandboxes: Listed[];
  cursor: string | null;
}

const OURS = /^mab[a-z2-7]{24}$/;
const PREFIX = "mabridge:";
const PAGE = 20;
/** Seconds that a container outlives its deadline, for the case that the alarm fails. */
const GRACE = 300;

export class Sandbox extends VendorSandbox<Env> {
  override interceptHttps = true;

  constructor(ctx: DurableObjectState, env: Env) {
    super(ctx as never, env);
    this.enableInternet = env.ENABLE_INTERNET === "true";
    const hosts = (env.ALLOWED_HOSTS ?? "").split(",").map((host) => host.trim());
    this.allowedHosts = this.enableInternet ? undefined : hosts.filter((host) => host !== "");
  }
}

export class WarmPool extends VendorWarmPool {
  private starting = new Map<string, Promise<boolean>>();

  /** The bridge asks for the container of every request. It gets none for a sandbox of ours that is not registered. */
  override async getContainer(id: string): Promise<string> {
    if (!OURS.test(id)) return await super.getContainer(id);
    const entry = await this.find(id);
    if (entry === null) throw new Error(`mabridge: there is no sandbox ${id}`);
    return entry.container;
  }

  /** Start a sandbox and remember it. One that is there stays as it is; of two calls at once, the second waits. */
  async create(id: string, labels: Record<string, string>, ttl: number): Promise<boolean> {
    const starting = this.starting.get(id);
    if (starting !== undefined) {
      await starting;
      return false;
    }
    const start = this.start(id, labels, ttl).finally(() => this.starting.delete(id));
    this.starting.set(id, start);
    return await start;
  }

  /** What is remembered of a sandbox, if it runs and is not past its deadline. */
  async find(id: string): Promise<Entry | null> {
    const entry = await this.ctx.storage.get<Entry>(PREFIX + id);
    if (entry === undefined) return null;
    if (entry.deadline <= Date.now()) {
      await this.remove(id, entry);
      return null;
    }
    if ((await this.lookupContainer(id)) === entry.container) {
      const { status } = await this.sandbox(entry.container).getState();
      if (status === "running" || status === "healthy") return entry;
    }
    await this.ctx.storage.delete(PREFIX + id);
    return null;
  }

  /** Put a deadline off, if that makes it later. False if there is no such sandbox. */
  async keepAlive(id: string, ttl: number): Promise<boolean> {
    const entry = await this.find(id);
    if (entry === null) return false;
    const deadline = Date.now() + ttl * 1000;
    if (deadline > entry.deadline) {
      // The container must not sleep before: its own clock starts anew with every request, this one among them.
      await this.sandbox(entry.container).setSleepAfter(ttl + GRACE);
      await this.put(id, { ...entry, deadline });
    }
    await this.sandbox(entry.container).renewActivityTimeout();
    return true;
  }

  /** A page of the sandboxes that are there, and where the next one begins. */
  async page(cursor: string | null): Promise<Page> {
    const start = cursor === null ? {} : { startAfter: PREFIX + cursor };
    const stored = await this.ctx.storage.list<Entry>({ prefix: PREFIX, limit: PAGE, ...start });
    const sandboxes: Listed[] = [];
    let last: string | null = null;
    for (const [key, { labels, created, deadline, container }] of stored) {
      last = key.slice(PREFIX.length);
      if (deadline > Date.now() && (await this.lookupContainer(last)) === container) {
        sandboxes.push({ id: last, labels, created, deadline });
      }
    }
    return { sandboxes, cursor: stored.size < PAGE ? null : last };
  }

  /** Every ten seconds: remove what is past its deadline, and forget what has gone by itself. */
  override async alarm(): Promise<void> {
    try {
      const stored = await this.ctx.storage.list<Entry>({ prefix: PREFIX });
      for (const [key, entry] of stored) {
        const id = key.slice(PREFIX.length);
        if (entry.deadline <= Date.now()) await this.remove(id, entry);
        else if ((await this.lookupContainer(id)) !== entry.container) await this.ctx.storage.delete(key);
      }
    } catch (error) {
      console.error({ message: "Removing sandboxes failed; the next alarm tries again", component: "mabridge", error });
    }
    // Where the platform had no room once, the pool takes what it had then for its size, for good.
    (this as unknown as { knownMaxInstances: number | null }).knownMaxInstances = null;
    await super.alarm();
  }

  private async start(id: string, labels: Record<string, string>, ttl: number): Promise<boolean> {
    if ((await this.find(id)) !== null) return false;
    const container = await super.getContainer(id);
    await this.sandbox(container).setSleepAfter(ttl + GRACE);
    const now = Date.now();
    await this.put(id, { labels, created: now, deadline: now + ttl * 1000, container });
    return true;
  }

  private async remove(id: string, entry: Entry): Promise<void> {
    await this.sandbox(entry.container).destroy();
    await this.reportStopped(entry.container);
    await this.ctx.storage.delete(PREFIX + id);
  }

  private async put(id: string, entry: Entry): Promise<void> {
    await this.ctx.storage.put(PREFIX + id, entry);
  }

  private sandbox(container: string): DurableObjectStub<Sandbox> {
    const namespace = (this.env as unknown as Env).Sandbox;
    return namespace.get(namespace.idFromName(container));
  }
}

function problem(error: string, code: string, status: number): Response {
  return Response.json({ error, code }, { status });
}

async function isAllowed(request: Request, key: string): Promise<boolean> {
  const given = (request.headers.get("Authorization") ?? "").replace(/^Bearer /i, "");
  const digest = async (text: string) => await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return crypto.subtle.timingSafeEqual(await digest(given), await digest(key));
}

async function register(request: Request, env: Env): Promise<Response> {
  const url = new URL(request.url);
  const pool = env.WarmPool.get(env.WarmPool.idFromName("global-pool"));
  const [, , , , id, action] = url.pathname.split("/");
  const route = `${request.method} ${action ?? (id === undefined ? "sandboxes" : "sandbox")}`;
  if (id !== undefined && !OURS.test(id)) return problem("Invalid sandbox ID format", "invalid_request", 400);
  if (id === undefined) {
    if (route !== "GET sandboxes") return problem("No such route", "not_found", 404);
    return Response.json(await pool.page(url.searchParams.get("cursor")));
  }
  const missing = problem(`There is no sandbox ${id}`, "not_found", 404);
  if (route === "GET sandbox") {
    const entry = await pool.find(id);
    return entry === null ? missing : Response.json({ id, ...entry });
  }
  const body = await request.json<{ labels?: Record<string, string>; ttl?: number }>().catch(() => null);
  const ttl = body?.ttl;
  if (typeof ttl !== "number" || !(ttl > 0)) return problem("ttl must be a number of seconds", "invalid_request", 400);
  if (route === "PUT sandbox") {
    try {
      const created = await pool.create(id, body?.labels ?? {}, ttl);
      return Response.json({ id, created }, { status: created ? 201 : 200 });
    } catch (error) {
      const said = error instanceof Error ? error.message : String(error);
      if (said.includes("instance limit reached")) return problem(said, "capacity_exceeded", 503);
      return problem(`pool error: ${said}`, "pool_error", 502);
    }
  }
  if (route === "POST keep-alive") return (await pool.keepAlive(id, ttl)) ? Response.json({ id }) : missing;
  return problem("No such route", "not_found", 404);
}

const vendor = bridge({
  async fetch(request: Request, env: Env): Promise<Response> {
    const path = new URL(request.url).pathname;
    if (path === "/mabridge/v1") return Response.json({ mabridge: 1 });
    if (path === "/mabridge/v1/sandboxes" || path.startsWith("/mabridge/v1/sandboxes/")) {
      return await register(request, env);
    }
    return problem("No such route", "not_found", 404);
  },
});

export default {
  ...vendor,
  async fetch(request, env, ctx): Promise<Response> {
    if (new URL(request.url).pathname !== "/health") {
      // Without a key the bridge would let everybody in.
      if (!env.SANDBOX_API_KEY) return problem("SANDBOX_API_KEY is not set", "unconfigured", 503);
      if (!(await isAllowed(request, env.SANDBOX_API_KEY))) return problem("Unauthorized", "unauthorized", 401);
    }
    return (await vendor.fetch?.(request as never, env, ctx)) ?? problem("No such route", "not_found", 404);
  },
} satisfies ExportedHandler<Env>;
