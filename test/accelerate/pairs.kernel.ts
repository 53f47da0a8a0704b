/** Which connections are accelerated and which are not, and how it is switched. */
import {fileURLToPath} from 'node:url';
import test from 'ava';
import {PROXY_MARK, PROXY_PORT, podEntry} from '../helpers/capture.js';
import {SIDECAR_ID} from '../helpers/istio-rules.js';
import {eventually, type Running} from '../helpers/process.js';
import {World, type As, type ManyResult, type Pod} from '../helpers/world.js';
import {attachNaive} from './naive.js';

const CHATTER = fileURLToPath(new URL('../helpers/chatter-child.js', import.meta.url));

interface Direction {
	readonly redirected: {readonly bytes: number; readonly messages: number};
	readonly passed: Readonly<Record<string, {readonly bytes: number; readonly messages: number}>>;
}

interface PodRow {
	readonly name: string;
	readonly reasons: Readonly<Record<string, number>>;
	readonly acceleration: {readonly sentByClient: Direction; readonly sentByServer: Direction};
}

interface SocketRow {
	readonly direction: string;
	readonly accelerated: string;
	readonly remote: string;
}

interface Chat {
	readonly rounds: number;
	readonly wrong: number;
	readonly failure: string;
}

class Chatter {
	private constructor(readonly running: Running) {}

	static async start(pod: Pod, host: string, rounds: number, bytes: number, as?: As): Promise<Chatter> {
		const chatter = new Chatter(pod.start([process.execPath, CHATTER, host, '8080', String(rounds), String(bytes)], as));
		await chatter.#told(1);
		return chatter;
	}

	async chat(rounds: number, bytes: number): Promise<Chat> {
		const count = this.running.lines().length;
		this.running.child.stdin!.write(`${rounds} ${bytes}\n`);
		await this.#told(count + 1);
		return this.last;
	}

	get last(): Chat {
		return this.running.lines<Chat>().at(-1)!;
	}

	async close(): Promise<void> {
		this.running.child.stdin!.end();
		await this.running.ended;
	}

	async #told(count: number): Promise<void> {
		await this.running.until('the chat is done', () => this.running.lines().length >= count, 30_000);
	}
}

const FINE = (rounds: number): Chat => ({rounds, wrong: 0, failure: ''});
const rowOf = (world: World, name = 'test/pod') => world.json<PodRow[]>('pods').find(row => row.name === name)!;
const redirected = ({acceleration: {sentByClient, sentByServer}}: PodRow) => [sentByClient.redirected.messages, sentByServer.redirected.messages] as const;

/** One that has shown itself chatty, and whose pair the agent has joined. */
async function joined(world: World, pod: Pod, host: string): Promise<Chatter> {
	const count = rowOf(world, `test/${pod.name}`).reasons['accelerated']!;
	const chatter = await Chatter.start(pod, host, 50, 64);
	await eventually('the pair is joined', () => rowOf(world, `test/${pod.name}`).reasons['accelerated']! > count);
	return chatter;
}

/** A captured pod with a proxy, and a far server. */
async function oneHop(world: World, options: readonly string[] = [], extra: object = {}) {
	const far = world.pod('far');
	const pod = world.pod('pod');
	await far.server(`${far.ipv4}:8080`, `[${far.ipv6}]:8080`);
	await pod.proxy(['--listen', `[::]:${PROXY_PORT}`, '--mark', String(PROXY_MARK), '--brief']);
	const agent = await world.agent([podEntry(pod, extra)], options);
	return {far, pod, agent};
}

test.serial('a chatty connection through the proxy is accelerated inside the pod, both ways, in both families, once it is asked for', async t => {
	const world = World.create(t);
	const {far, pod, agent} = await oneHop(world);
	await agent.says(/acceleration is off\n/);
	t.is(world.sidestep('acceleration', 'auto').stdout, 'auto\n');
	for (const host of [far.ipv4, far.ipv6]) {
		const chatter = await joined(world, pod, host);
		const before = redirected(rowOf(world));
		t.deepEqual(await chatter.chat(500, 64), FINE(500));
		const after = redirected(rowOf(world));
		t.true(after[0] - before[0] > 490 && after[1] - before[1] > 490, `${host}: ${String(before)}, then ${String(after)}`);
		const sockets = world.json<SocketRow[]>('sockets', 'test/pod').filter(({accelerated}) => accelerated === 'yes');
		t.deepEqual(sockets.map(({direction}) => direction).sort(), ['in', 'out']);
		await chatter.close();
	}

	t.is(rowOf(world).reasons['accelerated'], 2);
	await eventually('nothing is left', () => world.json<Array<{name: string; entries: number}>>('map', 'list').find(({name}) => name === 'accelerated')!.entries === 0);
});

test.serial('between two captured pods every local pair is accelerated: application, proxy, proxy, application', async t => {
	const world = World.create(t);
	const [client, server] = [world.pod('client'), world.pod('server')];
	await server.server(`0.0.0.0:8080`, `[${server.ipv6}]:8080`);
	for (const pod of [client, server]) {
		await pod.ztunnel(['--sidecar', '--brief'], {uid: SIDECAR_ID, gid: SIDECAR_ID});
	}

	await world.agent([client, server].map(({name, netns}) => ({name: `test/${name}`, netns, mode: 'sidecar'})), ['--acceleration', 'on']);
	for (const host of [server.ipv4, server.ipv6]) {
		const chatter = await Chatter.start(client, host, 500, 64);
		t.deepEqual(chatter.last, FINE(500));
		t.deepEqual(await chatter.chat(20, 300_000), FINE(20));
		t.deepEqual(await chatter.chat(500, 200), FINE(500));
		await chatter.close();
	}

	// From the client's pod: to its proxy, and from there to the other pod's; from the server's pod: to the application.
	t.is(rowOf(world, 'test/client').reasons['accelerated'], 4);
	t.is(rowOf(world, 'test/server').reasons['accelerated'], 2);
	for (const name of ['test/client', 'test/server']) {
		const [byClient, byServer] = redirected(rowOf(world, name));
		t.true(byClient > 500 && byServer > 500, `${name}: ${byClient}, ${byServer}`);
	}
});

test.serial('what exchanges little, goes elsewhere, or would see EAGAIN stays on TCP', async t => {
	const world = World.create(t);
	const {far, pod} = await oneHop(world, ['--acceleration', 'on']);
	const many: ManyResult = await pod.clients([`${far.ipv4}:8080`], ['--count', '200', '--parallel', '4']);
	t.is(many.ok, 200);
	t.is(rowOf(world).reasons['accelerated'], 0);

	// The stand-in client's sockets block.
	const blocking = pod.startClients([`${far.ipv4}:8080`], ['--hold']);
	await blocking.until('connected', () => blocking.stdout.includes('\n'));
	for (let round = 0; round < 40; round++) {
		const before = blocking.lines().length;
		blocking.child.stdin!.write('x\n');
		await blocking.until('answer', () => blocking.lines().length > before);
	}

	const {reasons} = rowOf(world);
	t.is(reasons['unaccelerated_blocking'], 1);
	t.is(reasons['accelerated'], 0);
	t.deepEqual(redirected(rowOf(world)), [0, 0]);
});

test.serial('a socket in another\'s sockmap stays on TCP, and check names whose it is', async t => {
	const world = World.create(t);
	const {far, pod} = await oneHop(world, ['--acceleration', 'on']);
	// It has only one end of the pair, and so redirects nothing.
	const cgroup = world.subCgroup('other');
	attachNaive(world, 'naive_known_peer', cgroup);
	const chatter = await Chatter.start(pod, far.ipv4, 100, 64, {cgroup});
	await eventually('it is counted', () => rowOf(world).reasons['unaccelerated_busy']! > 0);
	t.is(rowOf(world).reasons['accelerated'], 0);
	t.deepEqual(await chatter.chat(100, 64), FINE(100));
	const {state, detail} = world.json<Array<{name: string; state: string; detail: string}>>('check').find(({name}) => name === 'other sockmaps')!;
	t.is(state, 'degraded');
	t.regex(detail, /enrol \(sock_ops, program \d+\)/);
	t.regex(detail, /redirect \(sk_msg, program \d+\)/);
	t.notRegex(detail, /move_bytes|one_queue|handshake/);
	await chatter.close();
});

test.serial('off is one write, for running connections too, and survives the agent; on again, they come back', async t => {
	const world = World.create(t);
	const {far, pod, agent} = await oneHop(world, ['--acceleration', 'on']);
	const chatter = await joined(world, pod, far.ipv4);
	t.is(world.sidestep('acceleration', 'off').stdout, 'off\n');
	const before = redirected(rowOf(world));
	t.deepEqual(await chatter.chat(200, 64), FINE(200));
	t.deepEqual(redirected(rowOf(world)), before);
	t.true(rowOf(world).acceleration.sentByClient.passed['off']!.messages >= 200);

	await agent.running.stop('SIGKILL');
	const next = world.startAgent();
	await next.ready();
	t.is(world.sidestep('acceleration').stdout, 'off\n');
	t.deepEqual(await chatter.chat(100, 64), FINE(100));
	t.deepEqual(redirected(rowOf(world)), before);

	t.is(world.sidestep('acceleration', 'on').stdout, 'on\n');
	t.deepEqual(await chatter.chat(200, 64), FINE(200));
	t.true(redirected(rowOf(world))[0] - before[0] > 150);
	await chatter.close();
});

test.serial('a pod can say off, and change its mind', async t => {
	const world = World.create(t);
	const {far, pod, agent} = await oneHop(world, ['--acceleration', 'on'], {acceleration: 'off'});
	const chatter = await Chatter.start(pod, far.ipv4, 100, 64);
	t.is(rowOf(world).reasons['accelerated'], 0);
	world.writePods([podEntry(pod)]);
	await agent.says(/update test\/pod/);
	const fresh = await joined(world, pod, far.ipv4);
	t.is(rowOf(world).reasons['accelerated'], 1);
	const before = redirected(rowOf(world));
	world.writePods([podEntry(pod, {acceleration: 'off'})]);
	await agent.says(/update test\/pod[^]*update test\/pod/);
	t.deepEqual(await fresh.chat(100, 64), FINE(100));
	t.deepEqual(redirected(rowOf(world)), before);
	await chatter.close();
	await fresh.close();
});

test.serial('without an agent nothing new is accelerated, nothing breaks, and what is accelerated stays so', async t => {
	const world = World.create(t);
	const {far, pod, agent} = await oneHop(world, ['--acceleration', 'on']);
	const old = await joined(world, pod, far.ipv4);
	await agent.running.stop('SIGKILL');
	const fresh = await Chatter.start(pod, far.ipv4, 200, 64);
	t.deepEqual(fresh.last, FINE(200));
	t.is(rowOf(world).reasons['accelerated'], 1);
	const before = redirected(rowOf(world));
	t.deepEqual(await old.chat(200, 64), FINE(200));
	t.true(redirected(rowOf(world))[0] - before[0] > 150);

	await world.startAgent().ready();
	t.deepEqual(await fresh.chat(100, 64), FINE(100), 'it asks again, or stays on TCP; it does not break');
	await old.close();
	await fresh.close();
});

test.serial('unload resets accelerated connections, so that no byte is lost unnoticed; with --drain it waits for their end', async t => {
	const world = World.create(t);
	const {far, pod, agent} = await oneHop(world, ['--acceleration', 'on']);
	const first = await joined(world, pod, far.ipv4);
	await agent.running.stop();
	t.is(world.sidestep('unload').code, 0);
	t.regex((await first.chat(10, 64)).failure, /^(?:ECONNABORTED|ECONNRESET|EPIPE)$/);

	const again = await world.agent([podEntry(pod)], ['--acceleration', 'on']);
	const second = await joined(world, pod, far.ipv4);
	await again.running.stop();
	const unload = world.startSidestep('unload', '--drain');
	await unload.until('it waits', () => /2 accelerated sockets are still open/.test(unload.stderr));
	t.deepEqual(await second.chat(100, 64), FINE(100));
	t.false(unload.hasEnded);
	await second.close();
	t.is(await unload.ended, 0);
	t.regex(unload.stdout, /unloaded/);
});
