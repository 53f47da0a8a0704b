/** Agents stop, are killed and are upgraded to another layout while connections come, go and stay. */
import {readdirSync, rmSync} from 'node:fs';
import {fileURLToPath} from 'node:url';
import test, {type ExecutionContext} from 'ava';
import {setAcceleration} from '../../src/loader/acceleration.js';
import {openDatapath, type Datapath} from '../../src/loader/datapath.js';
import {POD_ACCELERATE, sumCounters, sumTraffic} from '../../src/maps/schema.js';
import {native} from '../../src/native.js';
import {PROXY_MARK, PROXY_PORT, podEntry} from '../helpers/capture.js';
import {OBJECTS} from '../helpers/layouts.js';
import {Running, eventually, run} from '../helpers/process.js';
import {startVersion} from '../helpers/versions.js';
import {World, type DnsResult, type ManyResult, type Pod} from '../helpers/world.js';

const CHATTER = fileURLToPath(new URL('../helpers/chatter-child.js', import.meta.url));
const DYING_LOADER = fileURLToPath(new URL('../helpers/dying-loader.js', import.meta.url));

const both = ({ipv4, ipv6}: Pod) => [`${ipv4}:8080`, `[${ipv6}]:8080`];
const ambient = (pod: Pod) => ({name: `test/${pod.name}`, netns: pod.netns, mode: 'ambient'});

function look<T>(world: World, layout: number, act: (datapath: Datapath) => T): T {
	const datapath = openDatapath(world.bpffs, OBJECTS[layout]);
	try {
		return act(datapath);
	} finally {
		datapath.close();
	}
}

const cookieOf = (pod: Pod) => {
	const netns = native.openNetns(pod.netns);
	const cookie = netns.cookie();
	netns.close();
	return cookie;
};

const reasonsOf = (world: World, layout: number, pod: Pod) => look(world, layout, ({maps, schema}) => Object.fromEntries([...sumCounters(schema, maps.counters.getAll(cookieOf(pod))!)].map(([name, count]) => [name, Number(count)])));
const redirectedOf = (world: World, layout: number, pod: Pod) => look(world, layout, ({maps, schema}) => Number(sumTraffic(schema, maps.traffic.getAll(cookieOf(pod))!).redirectedMessages));

/** Round trips on one connection, of which every byte is compared. */
class Chatter {
	readonly running: Running;

	constructor(pod: Pod, host: string) {
		this.running = pod.start([process.execPath, CHATTER, host, '8080', '50', '64']);
	}

	/** Waits for its first words too. */
	async chat(rounds: number, bytes: number): Promise<{readonly rounds: number; readonly wrong: number; readonly failure: string}> {
		await this.running.until('it is connected', () => this.running.lines().length > 0);
		const before = this.running.lines().length;
		this.running.child.stdin!.write(`${rounds} ${bytes}\n`);
		await this.running.until('the chat is done', () => this.running.lines().length > before);
		return this.running.lines<{rounds: number; wrong: number; failure: string}>().at(-1)!;
	}
}

/** Does something again and again until it is stopped. */
class Keep {
	readonly total = {done: 0, bad: [] as unknown[]};
	readonly #loop: Promise<void>;
	#isStopping = false;

	constructor(world: World, readonly name: string, act: () => Promise<{readonly done: number; readonly bad: readonly unknown[]}>) {
		world.onEnd(() => {
			this.#isStopping = true;
		});
		this.#loop = (async () => {
			while (!this.#isStopping) {
				const {done, bad} = await act();
				this.total.done += done;
				this.total.bad.push(...bad);
			}
		})();
		// It is waited for at the end; when the test fails before that, nobody does.
		this.#loop.catch(() => {});
	}

	async more(count: number): Promise<void> {
		const before = this.total.done;
		await Promise.race([eventually(`more of ${this.name}`, () => this.total.done >= before + count, 60_000), this.#loop]);
	}

	async stop(): Promise<void> {
		this.#isStopping = true;
		await this.#loop;
	}
}

const BATCH = 250;

function keepConnecting(from: Pod, to: readonly string[], name: string): Keep {
	return new Keep(from.world, name, async () => {
		const running = from.startClients(to, ['--count', String(BATCH), '--parallel', '6', '--timeout', '10000']);
		await running.ended;
		const lines = running.lines<ManyResult>();
		const last = lines.at(-1)!;
		return {done: last.ok, bad: last.failed > 0 || last.wrong_peer > 0 ? lines : []};
	});
}

const RESOLVERS = Array.from({length: 16}, (_, index) => index % 2 === 0 ? `10.96.0.${index + 1}:53` : `[fd96::${index + 1}]:53`);
const BY_FAMILY = [RESOLVERS.filter(address => !address.startsWith('[')), RESOLVERS.filter(address => address.startsWith('['))];

function keepAsking(from: Pod, name: string): Keep {
	let turn = 0;
	return new Keep(from.world, name, async () => {
		const options = [[], ['--unconnected'], ['--tcp']][turn % 3]!;
		const running = from.start([from.world.program('dns'), ...BY_FAMILY[turn++ % 2]!.flatMap(address => ['--to', address]), '--timeout', '10000', ...options]);
		await running.ended;
		const results = running.lines<DnsResult>();
		const isRight = ({outcome, to, answer, answer_from: from_, peer}: DnsResult) =>
			outcome === 'ok' && answer?.server === 'ztunnel' && (options[0] === '--tcp' || from_ === to) && (options[0] === '--unconnected' || peer === to);
		return {done: results.filter(isRight).length, bad: results.length === 8 ? results.filter(result => !isRight(result)) : [running.stderr]};
	});
}

function keepChatting(from: Pod, host: string, name: string): Keep {
	const chatter = new Chatter(from, host);
	let turn = 0;
	return new Keep(from.world, name, async () => {
		// Small messages are redirected, large ones go by TCP: it comes and goes.
		const [rounds, bytes] = ++turn % 10 === 0 ? [3, 300_000] as const : [100, 200] as const;
		const result = await chatter.chat(rounds, bytes);
		return {done: result.rounds, bad: result.wrong > 0 || result.failure !== '' || result.rounds !== rounds ? [result] : []};
	});
}

/** A pod in mode proxy, one in mode ambient, and a server that is not captured. */
async function setUp(t: ExecutionContext) {
	const world = World.create(t);
	const [far, plain, mesh] = [world.pod('far'), world.pod('plain'), world.pod('mesh')];
	await far.server(...both(far));
	await mesh.server(...both(mesh));
	await plain.proxy(['--listen', `[::]:${PROXY_PORT}`, '--mark', String(PROXY_MARK), '--brief']);
	await mesh.ztunnel(['--brief']);
	world.writePods([{...podEntry(plain) as {name: string}, acceleration: 'on'}, {...ambient(mesh), acceleration: 'on'}]);
	return {world, far, plain, mesh};
}

test.serial('20,000 connections and DNS through a restart, a kill, an upgrade that dies half-way, its end, and another kill: none fails', async t => {
	t.timeout(240_000);
	const {world, far, plain, mesh} = await setUp(t);
	let agent = await startVersion(world, 2);
	look(world, 2, datapath => setAcceleration(datapath, 'on'));
	const connections = [
		keepConnecting(plain, both(far), 'mode proxy'),
		keepConnecting(mesh, both(far), 'ambient, out'),
		keepConnecting(far, both(mesh), 'ambient, in'),
	];
	const dns = keepAsking(mesh, 'DNS');
	const chats = [keepChatting(plain, far.ipv4, 'long, mode proxy'), keepChatting(plain, far.ipv6, 'long, mode proxy, IPv6'), keepChatting(mesh, far.ipv4, 'long, ambient, out'), keepChatting(far, mesh.ipv4, 'long, ambient, in')];
	const held = plain.startClients(both(far), ['--count', '50', '--hold']);
	const all = [...connections, dns, ...chats];
	const more = async (count = 200) => Promise.all(all.map(async keep => keep.more(keep === dns ? 16 : chats.includes(keep) ? 100 : count)));
	await more();
	await eventually('pairs are accelerated', () => redirectedOf(world, 2, plain) > 100);
	const phases: Array<readonly [string, number]> = [];
	const phase = async (name: string, act: () => Promise<void>) => {
		const before = connections.reduce((sum, {total}) => sum + total.done, 0);
		await act();
		await more();
		phases.push([name, connections.reduce((sum, {total}) => sum + total.done, 0) - before]);
	};

	await phase('restart', async () => {
		t.is(await agent.running.stop('SIGTERM'), 0);
		agent = await startVersion(world, 2);
	});
	await phase('no agent after SIGKILL', async () => {
		await agent.running.stop('SIGKILL');
	});
	await phase('next agent', async () => {
		agent = await startVersion(world, 2);
		await agent.running.stop('SIGTERM');
	});
	await phase('half-way', async () => {
		const {code, stderr} = run(process.execPath, [DYING_LOADER, 'load', world.bpffs, world.cgroup, 'bind4 switched', OBJECTS[3]!]);
		t.is(code, null, stderr);
		t.deepEqual(readdirSync(`${world.bpffs}/sidestep`).sort(), ['v2', 'v3']);
	});
	await phase('upgrade finished', async () => {
		agent = await startVersion(world, 3);
		await agent.says(/programs upgraded at .*\/v3/);
		t.deepEqual(readdirSync(`${world.bpffs}/sidestep`), ['v3']);
	});
	const redirected = redirectedOf(world, 3, plain);
	await phase('killed again', async () => {
		await agent.running.stop('SIGKILL');
		agent = await startVersion(world, 3);
		await agent.says(/programs adopted/);
	});
	t.true(redirectedOf(world, 3, plain) > redirected, 'acceleration goes on');
	while (connections.reduce((sum, {total}) => sum + total.done, 0) < 20_000) {
		await more();
	}

	await Promise.all(all.map(async keep => keep.stop()));
	for (const {name, total} of all) {
		t.deepEqual(total.bad.slice(0, 3), [], name);
	}

	held.child.stdin!.write('still there?\n');
	await held.until('held connections answer', () => held.stdout.includes('"round":1'));
	t.like(held.lines<{ok?: number}>().at(-1), {round: 1, ok: 50, failed: 0});

	const [outOfPlain, outOfMesh, intoMesh] = connections.map(({total}) => total.done) as [number, number, number];
	// Each was captured, whichever programs and maps there were at that moment, and counted once.
	const plainReasons = reasonsOf(world, 3, plain);
	t.like(plainReasons, {redirected: outOfPlain + 52, accepted: outOfPlain + 52, connect_failed: 0, original_dst_lost: 0});
	const meshReasons = reasonsOf(world, 3, mesh);
	t.like(meshReasons, {redirected: outOfMesh + 1, inbound_refused: 0, connect_failed: 0, original_dst_lost: 0, pass_lost: 0, listener_lost: 0, source_port_left: 0});
	t.true(meshReasons['steered']! >= intoMesh + 1, `${meshReasons['steered']} of ${intoMesh}`);
	t.log(phases.map(([name, count]) => `${name}: ${count}`).join(', '));
	t.log(all.map(({name, total}) => `${name}: ${total.done}`).join(', '), {accelerated: plainReasons['accelerated']! + meshReasons['accelerated']!, redirected: redirectedOf(world, 3, plain) + redirectedOf(world, 3, mesh)});
});

test.serial('a connection that was accelerated before an upgrade stays so, and does what the new version\'s maps say', async t => {
	const {world, far, plain} = await setUp(t);
	const agent = await startVersion(world, 2);
	look(world, 2, datapath => setAcceleration(datapath, 'on'));
	const chatter = new Chatter(plain, far.ipv4);
	await eventually('the pair is joined', () => reasonsOf(world, 2, plain)['accelerated']! > 0);
	const fine = (rounds: number) => ({rounds, wrong: 0, failure: ''});
	t.deepEqual(await chatter.chat(200, 64), fine(200));
	const before = redirectedOf(world, 2, plain);
	t.true(before > 300, String(before));
	await agent.running.stop('SIGTERM');
	await startVersion(world, 3);
	t.is(redirectedOf(world, 3, plain), before, 'the counts went along');
	t.deepEqual(await chatter.chat(200, 64), fine(200));
	const after = redirectedOf(world, 3, plain);
	t.true(after - before > 390, `${before}, ${after}`);
	look(world, 3, ({maps}) => {
		const cookie = cookieOf(plain);
		const pod = maps.pods.get(cookie)!;
		maps.pods.set(cookie, {...pod, flags: pod.flags & ~POD_ACCELERATE});
	});
	t.deepEqual(await chatter.chat(200, 64), fine(200));
	t.is(redirectedOf(world, 3, plain), after);
});

test.serial('an older version\'s agent that is started after the upgrade says why it cannot, and the newer one goes on', async t => {
	const {world, far, plain} = await setUp(t);
	await (await startVersion(world, 3)).running.stop('SIGTERM');
	await t.throwsAsync(startVersion(world, 2), {message: /holds layout v3 of sidestep .*, and this is layout v2 of sidestep .*: there is no way back/});
	const {ok, failed} = await plain.clients(both(far), ['--count', '20']);
	t.deepEqual([ok, failed], [20, 0]);
	await startVersion(world, 3);
	t.is(reasonsOf(world, 3, plain)['accepted'], 20);
});

test.serial('two agents at once, of two versions: the second says so, and nothing is upgraded', async t => {
	const {world} = await setUp(t);
	await startVersion(world, 2);
	await t.throwsAsync(startVersion(world, 3), {message: /another sidestep writes to .*: stop that agent first/});
	t.deepEqual(readdirSync(`${world.bpffs}/sidestep`), ['v2']);
});

test.serial('after a reboot of the node, with an empty bpffs and new namespaces, the agent builds all of it again', async t => {
	const {world, far, plain} = await setUp(t);
	const agent = await startVersion(world, 2);
	const ids = () => look(world, 2, ({programs}) => [...programs.values()].map(program => program.info().id));
	const before = ids();
	await agent.running.stop('SIGKILL');
	// Not the unmounting alone: another process's mount namespace may still have this bpffs in it.
	rmSync(`${world.bpffs}/sidestep`, {recursive: true});
	native.unmount(world.bpffs);
	native.mountBpffs(world.bpffs);
	const reborn = world.pod('reborn');
	await reborn.proxy(['--listen', `[::]:${PROXY_PORT}`, '--mark', String(PROXY_MARK), '--brief']);
	world.writePods([{...podEntry(reborn) as object, name: `test/${plain.name}`}]);
	await (await startVersion(world, 2)).says(/programs loaded/);
	t.false(ids().some(id => before.includes(id)));
	const {ok, failed} = await reborn.clients(both(far), ['--count', '20']);
	t.deepEqual([ok, failed], [20, 0]);
	t.like(reasonsOf(world, 2, reborn), {redirected: 20, accepted: 20});
	await eventually('what was captured before has no programs any more', () => {
		const {hello, local} = plain.client(`${far.ipv4}:8080`);
		return hello?.peer === local;
	});
});
