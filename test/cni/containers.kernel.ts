import {setTimeout as sleep} from 'node:timers/promises';
import test, {type ExecutionContext} from 'ava';
import {CniServer, type CniCall, type CniHandler} from '../../src/cni/server.js';
import {PROXY_MARK, PROXY_PORT, EXEMPT} from '../helpers/capture.js';
import {eventually, type Running} from '../helpers/process.js';
import {World, type Agent, type ProxyLine} from '../helpers/world.js';
import {ContainerHost} from './container-host.js';

const HOUR_MS = 3_600_000;

async function serve(t: ExecutionContext, {socketPath}: ContainerHost, handler: Partial<CniHandler>): Promise<CniServer> {
	const server = new CniServer({socketPath, log: () => undefined, handler: {add: async () => undefined, check: async () => undefined, del: async () => undefined, ...handler}});
	await server.listen();
	t.teardown(async () => server.close());
	return server;
}

test('a container starts when the handler says so and not before; DEL comes at its end', async t => {
	for (const cniVersion of ['0.4.0', '1.0.0']) {
		const host = await ContainerHost.create(World.create(t), {cniVersion});
		const calls: Array<[string, CniCall]> = [];
		let release: () => void = () => undefined;
		const server = await serve(t, host, {
			async add(call) {
				calls.push(['add', call]);
				await new Promise<void>(resolve => {
					release = resolve;
				});
			},
			async del(call) {
				calls.push(['del', call]);
			},
		});
		const running = host.container('web', 'echo started; ip -o -4 addr show eth0');
		await eventually('ADD', () => {
			if (running.hasEnded) {
				throw new Error(running.stderr);
			}

			return calls.length === 1;
		});
		await sleep(1000);
		t.is(running.stdout, '');
		release();
		t.is(await running.ended, 0, running.stderr);
		t.regex(running.stdout, /^started\n/);
		const [[, add], [, del]] = calls as [[string, CniCall], [string, CniCall]];
		t.is(add.podName, 'web');
		t.is(add.podNamespace, '', 'podman knows of none');
		t.regex(add.netns, /^\/run\/netns\//);
		t.is(add.ips.length, 1);
		t.regex(running.stdout, new RegExp(`inet ${add.ips[0]}/24`));
		t.deepEqual(calls.map(([command]) => command), ['add', 'del']);
		t.deepEqual(del, add);
		t.deepEqual([server.counters.add.ok, server.counters.del.ok], [1, 1]);
	}
});

/** What an agent does at ADD, by hand: a proxy into the pod's namespace, capture, and the pod may start. */
class Enroller {
	readonly proxies: Running[] = [];

	constructor(readonly world: World, readonly host: ContainerHost) {}

	async enrol(call: CniCall, agent: Agent): Promise<void> {
		const netns = this.host.outside(call.netns);
		if (this.proxies.length === 0) {
			const [command, args] = [this.world.program('in'), ['--netns', netns, '--', this.world.program('proxy'), '--listen', `[::]:${PROXY_PORT}`, '--mark', String(PROXY_MARK)]];
			const proxy = this.world.node.start([command, ...args]);
			this.proxies.push(proxy);
			await proxy.until('ready', () => proxy.stdout.includes('"ready":true'));
		}

		this.world.writePods([{name: `podman/${call.podName}`, netns, ips: call.ips, proxy: {port: PROXY_PORT}, exempt: EXEMPT}]);
		await eventually('enrolled', () => this.world.json<Array<{name: string}>>('pods').some(({name}) => name === `podman/${call.podName}`));
		await eventually('ready', async () => (await agent.get('/readyz')).status === 200);
	}

	/** Until the proxies have told of `count` connections. @returns all that they told. */
	async told(count: number): Promise<readonly ProxyLine[]> {
		await eventually(`${count} connections by way of the proxies`, () => this.#lines().length >= count);
		return this.#lines();
	}

	#lines(): readonly ProxyLine[] {
		return this.proxies.flatMap(proxy => proxy.lines<ProxyLine>()).filter(line => 'original_dst' in line);
	}
}

/** Connects as the first thing it does, five times without a pause. */
const CONNECTING = (to: string) => `for i in 1 2 3 4 5; do echo hello | nc ${to.replace(':', ' ')} || exit 1; done`;

test('the very first connection of a container is captured', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	await far.server(`${far.ipv4}:8080`);
	const host = await ContainerHost.create(world);
	const agent = await world.agent([]);
	const enroller = new Enroller(world, host);
	await serve(t, host, {
		async add(call) {
			await enroller.enrol(call, agent);
		},
	});
	const running = host.container('web', CONNECTING(`${far.ipv4}:8080`));
	t.is(await running.ended, 0, running.stderr);
	const lines = await enroller.told(5);
	t.deepEqual(lines.map(line => line.original_dst), new Array(5).fill(`${far.ipv4}:8080`));
});

test('an agent that is down: the container does not start, and says why', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const server = await far.server(`${far.ipv4}:8080`);
	const host = await ContainerHost.create(world, {timeoutSeconds: 2});
	const before = host.links();
	const running = host.container('web', `echo started; ${CONNECTING(`${far.ipv4}:8080`)}`);
	t.not(await running.ended, 0);
	t.regex(running.stderr, /the sidestep agent did not let the pod start in 2 s \(connect: ENOENT: .*\): without it the pod would start uncaptured/);
	t.is(running.stdout, '');
	t.notRegex(server.stdout, /hello/);
	await eventually('the runtime took its interface away again', () => host.links() === before);
});

test('an agent that refuses: the container does not start, and has the agent\'s reason', async t => {
	const host = await ContainerHost.create(World.create(t));
	let isForgotten = false;
	await serve(t, host, {
		async add() {
			throw new Error('pod podman/web: no ztunnel is connected');
		},
		async del() {
			isForgotten = true;
		},
	});
	const running = host.container('web', 'echo started');
	t.not(await running.ended, 0);
	t.regex(running.stderr, /the sidestep agent refused: pod podman\/web: no ztunnel is connected/);
	t.is(running.stdout, '');
	t.true(isForgotten);
});

for (const [how, stop] of [
	['stops', async (agent: Agent, server: CniServer) => {
		await server.close();
		await agent.running.stop('SIGTERM');
	}],
	['is killed', async (agent: Agent, server: CniServer) => {
		await agent.running.stop('SIGKILL');
		await server.close();
	}],
] as const) {
	test(`an agent that ${how} while a container waits: it starts late, and captured`, async t => {
		const world = World.create(t);
		const far = world.pod('far');
		await far.server(`${far.ipv4}:8080`);
		const host = await ContainerHost.create(world);
		const enroller = new Enroller(world, host);
		const first = await world.agent([]);
		const server = await serve(t, host, {
			async add() {
				await sleep(HOUR_MS, undefined, {ref: false});
			},
		});
		const running = host.container('web', CONNECTING(`${far.ipv4}:8080`));
		await eventually('ADD', () => server.inFlight === 1);
		await stop(first, server);
		await sleep(700);
		t.false(running.hasEnded, running.stderr);
		const second = await world.agent([]);
		await serve(t, host, {
			async add(call) {
				await enroller.enrol(call, second);
			},
		});
		t.is(await running.ended, 0, running.stderr);
		const lines = await enroller.told(5);
		t.deepEqual(lines.map(line => line.original_dst), new Array(5).fill(`${far.ipv4}:8080`));
	});
}
