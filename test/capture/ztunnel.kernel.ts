/**
A stand-in for ztunnel in an ambient pod, by the thousand: who sees which address, what holds, and what happens when it comes, goes, or is not there.
*/
import test, {type ExecutionContext} from 'ava';
import {openDatapath} from '../../src/loader/datapath.js';
import {ambientRules} from '../helpers/istio-rules.js';
import {eventually, type Running} from '../helpers/process.js';
import {World, type Agent, type ClientResult, type ManyResult, type Pod, type ZtunnelLine} from '../helpers/world.js';

const OUTBOUND = 15_001;
const INBOUND = 15_006;
const PORTS = [8080, 8081, 9000];
/** One app of the pod listens on its own addresses only. */
const BOUND_PORT = 9001;

const host = (address: string) => address.includes(':') ? `[${address}]` : address;
const everywhere = (ports: readonly number[]) => ports.map(port => `[::]:${port}`);
const both = ({ipv4, ipv6}: Pod, ports: readonly number[]) => ports.flatMap(port => [`${ipv4}:${port}`, `[${ipv6}]:${port}`]);
const withoutPort = (endpoint: string) => endpoint.slice(0, endpoint.lastIndexOf(':'));
/** As dual-stack listeners show IPv4. */
const unmapped = (endpoint: string) => endpoint.replace(/^\[::ffff:([\d.]+)]/, '$1');

const ambient = (pod: Pod) => ({name: `test/${pod.name}`, netns: pod.netns, mode: 'ambient'});

interface Ambient {
	readonly world: World;
	readonly far: Pod;
	readonly pod: Pod;
	readonly proxy: Running;
	readonly agent: Agent;
}

/** A pod with its apps, under sidestep, and another one that is not captured. */
async function setUp(t: ExecutionContext, {more = [], brief = false}: {readonly more?: readonly string[]; readonly brief?: boolean} = {}): Promise<Ambient> {
	const world = World.create(t);
	const far = world.pod('far', {more});
	const pod = world.pod('pod');
	await far.server(...everywhere(PORTS));
	await pod.server(...everywhere(PORTS), ...both(pod, [BOUND_PORT]));
	const agent = await world.agent([ambient(pod)]);
	return {world, far, pod, agent, proxy: await pod.ztunnel(brief ? ['--brief'] : [])};
}

interface ProxyCounts {
	readonly accepted: number;
	readonly open: number;
}

/** The proxy answers after all that it had to say before. */
async function countsOf(proxy: Running): Promise<ProxyCounts> {
	const before = proxy.stdout.length;
	proxy.child.kill('SIGUSR1');
	await proxy.until('it has told everything', () => /^\{"accepted".*\n/m.test(proxy.stdout.slice(before)));
	return proxy.lines<ProxyCounts>().findLast(line => 'accepted' in line)!;
}

interface Held {
	readonly results: readonly ClientResult[];
	/** Of all of them, when the last one was made. */
	readonly echoes: {readonly ok: number; readonly failed: number};
	close(): Promise<void>;
}

async function hold(from: Pod, to: readonly string[], count: number, options: readonly string[] = []): Promise<Held> {
	const running = from.startClients(to, ['--count', String(count), '--hold', ...options]);
	running.child.stdin!.write('still there?\n');
	await eventually(`${count} connections are held`, () => running.stdout.slice(-100).includes('"round":'), 60_000);
	const lines = running.lines<ClientResult | Held['echoes']>();
	return {
		results: lines.slice(0, -1) as ClientResult[],
		echoes: lines.at(-1) as Held['echoes'],
		async close() {
			running.child.stdin!.end();
			await running.ended;
		},
	};
}

/** Connections of which somebody did not see what they should, with what the proxy said of them. */
async function wronglySeen(listener: number, results: readonly ClientResult[], proxy: Running): Promise<unknown[]> {
	await countsOf(proxy);
	const lines = proxy.lines<ZtunnelLine>().filter(line => 'listener' in line);
	// The kernel gives one port to connections that differ in their destination.
	const told = new Map(lines.map(line => [`${unmapped(line.peer)} ${line.original_dst}`, line]));
	const wrong: unknown[] = lines.length === results.length ? [] : [`the proxy accepted ${lines.length} connections of ${results.length}`];
	for (const client of results) {
		const line = told.get(`${client.local} ${client.to}`);
		const isRight = client.outcome === 'ok' && client.echo && client.peer === client.to
			&& line?.listener === listener && (listener === OUTBOUND || unmapped(line.local) === client.to)
			&& unmapped(client.hello?.server ?? '') === client.to && unmapped(client.hello?.peer ?? '') === line.upstream_local
			// The proxy goes on under the address that the connection came from: outwards the pod's, inwards the client's.
			&& withoutPort(line.upstream_local) === withoutPort(client.local);
		if (!isRight) {
			wrong.push({client, line});
		}
	}

	return wrong.slice(0, 3);
}

function reasonsOf(world: World, pod: Pod): Record<string, number> {
	return world.json<Array<{reasons: Record<string, number>}>>('pods', `test/${pod.name}`)[0]!.reasons;
}

/** When all connections are closed, none may be remembered. */
async function nothingIsLeft(world: World): Promise<void> {
	const FOREVER = 1e19;
	const entries = (map: string) => world.json<Array<{readonly busyUntilNs?: number | string}>>('map', 'dump', map);
	await eventually('no connection is remembered', () =>
		entries('passes').length === 0 && entries('handshakes').length === 0 && entries('client_ports').every(({busyUntilNs}) => Number(busyUntilNs) < FOREVER));
}

test.serial('1,000 connections out of the pod: the proxy sees the pod and each destination, the application and the server each other', async t => {
	const more = ['10.77.0.100', '10.77.0.101', 'fd77::100', 'fd77::101'];
	const {world, far, pod, proxy} = await setUp(t, {more});
	const held = await hold(pod, [far.ipv4, far.ipv6, ...more].flatMap(address => PORTS.map(port => `${host(address)}:${port}`)), 1000);
	t.like(held.echoes, {ok: 1000, failed: 0});
	t.deepEqual(await wronglySeen(OUTBOUND, held.results, proxy), []);
	t.like(reasonsOf(world, pod), {redirected: 1000, accepted: 1000, steered: 0});
	await held.close();
	await nothingIsLeft(world);
});

test.serial('1,000 connections into the pod: the proxy sees each client and destination, the application the client\'s own address', async t => {
	const {world, far, pod, proxy} = await setUp(t);
	const held = await hold(far, both(pod, [...PORTS, BOUND_PORT]), 1000);
	t.like(held.echoes, {ok: 1000, failed: 0});
	t.deepEqual(await wronglySeen(INBOUND, held.results, proxy), []);
	t.like(reasonsOf(world, pod), {redirected: 0, steered: 1000, source_kept: 1000, source_port_left: 0});
	await held.close();
	await nothingIsLeft(world);
});

for (const [title, family, count, firstPort, step] of [
	['3,000 from even ports', 4, 3000, 32_768, 2],
	['3,000 from odd ports', 4, 3000, 32_769, 2],
	['1,000 from odd ports, IPv6', 6, 1000, 32_769, 2],
	// Where sidestep itself takes ports from for the proxy to stand for this client (bpf/lib/client_ports.h).
	['3,000 from 61000 on', 4, 3000, 61_000, 1],
	['3,000 from 16384 on', 4, 3000, 16_384, 1],
	['1,000 from 61000 on, IPv6', 6, 1000, 61_000, 1],
] as const) {
	test.serial(`connections of one client to one port of the pod are held at once: ${title}`, async t => {
		const {world, far, pod, proxy} = await setUp(t);
		const [source, to] = (family === 4 ? [far.ipv4, pod.ipv4] : [far.ipv6, pod.ipv6]).map(host);
		const held = await hold(far, [`${to}:8080`], count, ['--bind', `${source}:${firstPort}`, '--step', String(step), '--timeout', '1000']);
		t.like(held.echoes, {ok: count, failed: 0});
		t.deepEqual(await wronglySeen(INBOUND, held.results, proxy), []);
		t.is(reasonsOf(world, pod)['source_kept'], count);
		await held.close();
		await nothingIsLeft(world);
	});
}

test.serial('a port that sidestep forgot to be in use is given out again without harm', async t => {
	const {world, far, pod, proxy} = await setUp(t);
	const before = await hold(far, [`${pod.ipv4}:8080`], 1000);
	const datapath = openDatapath(world.bpffs);
	t.teardown(() => {
		datapath.close();
	});
	const ports = datapath.schema.typed<unknown, unknown>('client_ports', datapath.rawMaps.get('client_ports')!);
	for (const [port] of ports.entries()) {
		ports.delete(port);
	}

	const after = await hold(far, [`${pod.ipv4}:8081`], 1000);
	t.deepEqual(await wronglySeen(INBOUND, [...before.results, ...after.results], proxy), []);
	t.is(proxy.stderr, '');
});

/** Goes before its client does. */
const HASTY_APP = 'require("net").createServer(socket => socket.end("bye", () => socket.destroy())).listen(9090, () => console.log("ready"))';
/** Stays when the server has gone. */
const PATIENT_CLIENT = 'require("net").connect({host: process.argv[1], port: 9090, allowHalfOpen: true}).resume(); setInterval(() => {}, 1000)';

test.serial('a client that comes from the very port under which the proxy stands for it does not get past the proxy', async t => {
	const {world, far, pod, proxy} = await setUp(t);
	// So that what the application leaves behind goes soon, while the proxy still holds its end.
	pod.must('sysctl', '-qw', 'net.ipv4.tcp_fin_timeout=1');
	const app = pod.start([process.execPath, '-e', HASTY_APP]);
	await app.until('it listens', () => app.stdout.includes('ready'));
	for (const to of [pod.ipv4, pod.ipv6]) {
		far.start([process.execPath, '-e', PATIENT_CLIENT, to]);
		const isOfClient = ({original_dst}: ZtunnelLine) => original_dst === `${host(to)}:9090`;
		await eventually('the client is there', () => proxy.lines<ZtunnelLine>().some(isOfClient));
		const {upstream_local: stand} = proxy.lines<ZtunnelLine>().find(isOfClient)!;
		await eventually('the application has gone', () => !pod.must('ss', '-Hotna', 'sport = 9090').includes(`${stand.split(':').at(-1)} `));
		t.regex(pod.must('ss', '-Htna', 'dport = 9090'), /CLOSE-WAIT/);
		const {accepted} = await countsOf(proxy);
		const result = far.client(`${host(to)}:9090`, ['--bind', stand, '--timeout', '500']);
		t.like(result, {stage: 'hello', outcome: 'EOF'});
		t.is((await countsOf(proxy)).accepted, accepted + 1);
	}

	t.is(reasonsOf(world, pod)['steered'], 4);
});

const OK = {outcome: 'ok', echo: true};

for (const when of ['before', 'after'] as const) {
	test.serial(`a proxy that was started ${when} the agent gets both directions`, async t => {
		const world = World.create(t);
		const [far, pod] = [world.pod('far'), world.pod('pod')];
		await far.server(...everywhere([8080]));
		await pod.server(...everywhere([8080]));
		const start = [async () => pod.ztunnel(), async () => world.agent([ambient(pod)])] as const;
		for (const action of when === 'before' ? start : start.toReversed()) {
			await action();
		}

		for (const [from, to] of [[far, pod], [pod, far]] as const) {
			for (const result of from.connections(both(to, [8080]))) {
				t.like(result, OK);
			}
		}

		t.like(reasonsOf(world, pod), {redirected: 2, accepted: 2, steered: 2, inbound_refused: 0});
	});
}

/** Connects, four at a time, until told to stop. */
function keepConnecting(from: Pod, to: readonly string[]) {
	const total = {ok: 0, errors: new Map<string, number>()};
	let isStopping = false;
	const loop = (async () => {
		while (!isStopping) {
			const {ok, errors} = await from.clients(to, ['--count', '100', '--parallel', '4']);
			total.ok += ok;
			for (const [name, count] of Object.entries(errors)) {
				total.errors.set(name, (total.errors.get(name) ?? 0) + count);
			}
		}
	})();
	// Nobody waits for it when the test has failed, and its clients end with the world.
	loop.catch(() => {
		isStopping = true;
	});
	from.world.onEnd(() => {
		isStopping = true;
	});
	return {
		total,
		async more() {
			const before = total.ok;
			await eventually('more connections were made', () => total.ok > before);
		},
		async stop() {
			isStopping = true;
			await loop;
			return total;
		},
	};
}

test.serial('proxies come and go beside each other, without an agent: none is refused, and only what the ended one held breaks', async t => {
	const {world, far, pod, agent, proxy} = await setUp(t, {brief: true});
	await agent.running.stop('SIGKILL');
	const loads = [keepConnecting(far, both(pod, [8080])), keepConnecting(pod, both(far, [8080]))];
	const more = async () => Promise.all(loads.map(async load => load.more()));
	let oldest = proxy;
	// More often than a pod has slots for listeners.
	const ROUNDS = 20;
	for (let round = 0; round < ROUNDS; round++) {
		const newer = await pod.ztunnel(['--brief']);
		await more();
		// The older one ends in even rounds, the newer one in odd ones.
		const [ended, lives] = round % 2 === 0 ? [oldest, newer] : [newer, oldest];
		await ended.stop('SIGKILL');
		await more();
		oldest = lives;
	}

	for (const {total} of await Promise.all(loads.map(async load => ({total: await load.stop()})))) {
		t.log(total);
		const broken = [...total.errors].filter(([name]) => ['EOF', 'ECONNRESET', 'EPIPE'].includes(name)).reduce((sum, [, count]) => sum + count, 0);
		t.is(broken, [...total.errors.values()].reduce((sum, count) => sum + count, 0), 'nobody was refused, and nobody waited in vain');
		t.true(broken <= 4 * ROUNDS, 'of four at a time, no more than four break with a proxy');
	}

	t.like(reasonsOf(world, pod), {inbound_refused: 0, connect_failed: 0, listener_lost: 0, original_dst_lost: 0});
	await nothingIsLeft(world);
});

test.serial('while no proxy listens, connections in both directions are refused; others pass', async t => {
	const {world, far, pod, proxy} = await setUp(t);
	const outcomes = () => [...far.connections(both(pod, [8080])), ...pod.connections(both(far, [8080]))].map(({outcome}) => outcome);
	const passing = () => [...pod.connections([...both(pod, [8080]), '127.0.0.1:8080']), ...world.node.connections(both(pod, [8080]))].map(({outcome}) => outcome);
	t.deepEqual(outcomes(), Array.from({length: 4}, () => 'ok'));
	await proxy.stop('SIGKILL');
	t.deepEqual(outcomes(), Array.from({length: 4}, () => 'ECONNREFUSED'));
	t.deepEqual(passing(), Array.from({length: 5}, () => 'ok'));
	t.like(reasonsOf(world, pod), {inbound_refused: 2, connect_failed: 2});
	await pod.ztunnel();
	t.deepEqual(outcomes(), Array.from({length: 4}, () => 'ok'));
	await nothingIsLeft(world);
});

test.serial('a port that no app listens on answers as fast as under iptables', async t => {
	const {world, far, pod} = await setUp(t, {brief: true});
	const reference = world.pod('reference');
	ambientRules(reference);
	await reference.ztunnel(['--brief']);
	const COUNT = 100;
	const results: Array<{readonly ms: number} & ManyResult> = [];
	for (const to of [reference, pod]) {
		const started = performance.now();
		const result = await far.clients(both(to, [9]), ['--count', String(COUNT)]);
		results.push({...result, ms: performance.now() - started});
	}

	const [theirs, ours] = results as [typeof results[0], typeof results[0]];
	t.log(`${COUNT} connections: iptables ${theirs.ms.toFixed(0)} ms, sidestep ${ours.ms.toFixed(0)} ms`);
	t.deepEqual(ours.errors, theirs.errors);
	t.deepEqual(ours.errors, {EOF: COUNT});
	t.true(ours.ms < 2 * theirs.ms + 500);
});

interface Settings {
	readonly rules: readonly string[];
	readonly routes: readonly string[];
	readonly sysctls: readonly string[];
}

/** What is configured in the namespace of a pod beyond what every namespace has. */
function settingsOf(pod: Pod): Settings {
	const shown = (...command: string[]) => pod.run(command).stdout.split('\n').map(line => line.trim().replaceAll(/\s+/g, ' ')).filter(Boolean);
	return {
		rules: ['-4', '-6'].flatMap(family => shown('ip', family, 'rule').filter(line => !/lookup (?:local|main|default)$/.test(line)).map(line => `${family} ${line}`)),
		routes: ['-4', '-6'].flatMap(family => shown('ip', family, 'route', 'show', 'table', '100').map(line => `${family} ${line}`)),
		sysctls: shown('sysctl', 'net.ipv4.tcp_fwmark_accept', 'net.ipv4.fwmark_reflect', 'net.ipv6.fwmark_reflect'),
	};
}

const UNCHANGED: Settings = {rules: [], routes: [], sysctls: ['net.ipv4.tcp_fwmark_accept = 0', 'net.ipv4.fwmark_reflect = 0', 'net.ipv6.fwmark_reflect = 0']};
const PREPARED: Settings = {
	rules: ['-4 32764: from all fwmark 0x111/0xfff lookup 100', '-6 32764: from all fwmark 0x111/0xfff lookup 100'],
	routes: ['-4 local default dev lo scope host', '-6 local default dev lo metric 1024 pref medium'],
	sysctls: ['net.ipv4.tcp_fwmark_accept = 1', 'net.ipv4.fwmark_reflect = 1', 'net.ipv6.fwmark_reflect = 1'],
};
const PREPARED4: Settings = {
	rules: PREPARED.rules.slice(0, 1),
	routes: PREPARED.routes.slice(0, 1),
	sysctls: [...PREPARED.sysctls.slice(0, 2), 'net.ipv6.fwmark_reflect = 0'],
};

/** As `ip` and `sysctl` make and take them. */
const SETTINGS = [
	...['-4', '-6'].map(family => ['ip', family, 'rule', '*', 'fwmark', '0x111/0xfff', 'pref', '32764', 'lookup', '100']),
	...['-4', '-6'].map(family => ['ip', family, 'route', '*', 'local', 'default', 'dev', 'lo', 'table', '100']),
	...['net.ipv4.tcp_fwmark_accept', 'net.ipv4.fwmark_reflect', 'net.ipv6.fwmark_reflect'].map(name => ['sysctl', '-w', `${name}=*`]),
];

function changeByHand(pod: Pod, settings: ReadonlyArray<readonly string[]>, change: 'make' | 'take'): void {
	for (const [program, ...words] of settings) {
		const word = {ip: {make: 'add', take: 'del'}, sysctl: {make: '1', take: '0'}}[program as 'ip' | 'sysctl'][change];
		pod.must(program!, ...words.map(each => each.replace('*', word)));
	}
}

test.serial('what capture needs in a namespace is made, made again, and taken back; what was there stays', async t => {
	const world = World.create(t);
	const plain = world.pod('plain');
	const had = world.pod('had');
	const hadHalf = world.pod('hadhalf');
	const ipv4 = world.pod('ipv4', {ipv6: false});
	const pods = [plain, had, hadHalf, ipv4];
	changeByHand(had, SETTINGS, 'make');
	const half = SETTINGS.filter((_, index) => index % 2 === 0);
	changeByHand(hadHalf, half, 'make');
	const before = pods.map(settingsOf);
	const prepared = [PREPARED, PREPARED, PREPARED, PREPARED4];
	t.deepEqual(before[0], UNCHANGED);
	t.deepEqual(before[1], PREPARED);

	const agent = await world.agent(pods.map(ambient), ['--resync', '200']);
	t.deepEqual(pods.map(settingsOf), prepared);

	for (const setting of SETTINGS) {
		const mark = agent.running.stderr.length;
		changeByHand(plain, [setting], 'take');
		await agent.says(/restore the namespace settings of test\/plain/, mark);
		t.deepEqual(settingsOf(plain), PREPARED, setting.join(' '));
	}

	const mark = agent.running.stderr.length;
	world.writePods([]);
	await agent.says(/remove test\/ipv4/, mark);
	t.deepEqual(pods.map(settingsOf), before);
	t.deepEqual(world.json('pods'), []);

	world.writePods(pods.map(ambient));
	await agent.says(/enrol test\/ipv4/, mark);
	await eventually('the namespaces are prepared', () => JSON.stringify(pods.map(settingsOf)) === JSON.stringify(prepared));
	await agent.running.stop('SIGKILL');
	// Somebody was faster.
	changeByHand(plain, half, 'take');
	const {code, stderr} = world.sidestep('unload');
	t.is(code, 0, stderr);
	t.is(stderr, '');
	t.deepEqual(pods.map(settingsOf), before);
});

test.serial('probes of the node pass, also from a process that is older than the agent; those of other pods are steered', async t => {
	const world = World.create(t);
	const [far, pod] = [world.pod('far'), world.pod('pod')];
	await pod.server(...everywhere([8080]));
	const older = world.node.start(['sh', '-c', 'read go; exec "$@"', 'sh', world.program('client'), ...both(pod, [8080]).flatMap(to => ['--to', to])]);
	await world.agent([ambient(pod)]);
	const proxy = await pod.ztunnel();
	const isDirect = ({local, hello}: ClientResult) => unmapped(hello?.peer ?? '') === local;
	const probe = async (results: readonly ClientResult[], expected: boolean) => {
		for (const result of results) {
			t.like(result, OK);
			t.is(isDirect(result), expected, result.to);
		}
	};

	older.child.stdin!.end('go\n');
	await older.ended;
	await probe(older.lines<ClientResult>(), true);
	await probe(world.node.connections(both(pod, [8080])), true);
	const many = await world.node.clients(both(pod, [8080]), ['--count', '500', '--parallel', '4']);
	t.like(many, {ok: 500, failed: 0});
	t.is((await countsOf(proxy)).accepted, 0);
	t.like(reasonsOf(world, pod), {inbound_bypass_node: 504, steered: 0});

	await probe(far.connections(both(pod, [8080])), false);
	t.is((await countsOf(proxy)).accepted, 2);
	t.like(reasonsOf(world, pod), {inbound_bypass_node: 504, steered: 2});
	await nothingIsLeft(world);
});

for (const hasProxy of [false, true]) {
	test.serial(`what a pod sends to itself never meets the proxy, ${hasProxy ? 'which is there' : 'which is not there'}`, async t => {
		const world = World.create(t);
		const pod = world.pod('pod', {more: ['10.77.0.100', 'fd77::100']});
		await pod.server('0.0.0.0:8080', ...['::1', pod.ipv6, 'fd77::100'].map(address => `[${address}]:8080`));
		await world.agent([ambient(pod)]);
		const proxy = hasProxy ? await pod.ztunnel() : undefined;
		const own = [...both(pod, [8080]), '10.77.0.100:8080', '[fd77::100]:8080', '127.0.0.1:8080', '[::1]:8080', '127.1.2.3:8080'];
		const COUNT = 700;
		t.like(await pod.clients(own, ['--count', String(COUNT), '--parallel', '4']), {ok: COUNT, failed: 0, wrong_peer: 0});
		// From each of its addresses to each other, and as the proxy itself would.
		const crossed = [['10.77.0.100:0', `${pod.ipv4}:8080`], [`${pod.ipv4}:0`, '127.0.0.1:8080'], ['127.0.0.1:0', `${pod.ipv4}:8080`], [`[${pod.ipv6}]:0`, '[fd77::100]:8080']] as const;
		for (const [from, to] of crossed) {
			for (const mark of [[], ['--mark', '0x539']]) {
				t.like(pod.client(to, ['--bind', from, ...mark]), OK, `${from} ${to} ${mark.join(' ')}`);
			}
		}

		t.is(pod.client(`${pod.ipv4}:9`).outcome, 'ECONNREFUSED');
		if (proxy) {
			t.is((await countsOf(proxy)).accepted, 0);
		}

		t.like(reasonsOf(world, pod), {redirected: 0, steered: 0, inbound_refused: 0, source_kept: 0, bypass_local: COUNT + crossed.length + 1, bypass_mark: crossed.length});
		await nothingIsLeft(world);
	});
}
