/** What happens to a pod that is running: its policy changes, it leaves capture, it was there first. */
import test from 'ava';
import {eventually, must, type Running} from '../helpers/process.js';
import {World, type ClientResult, type ManyResult, type Pod} from '../helpers/world.js';

interface SocketRow {
	readonly direction: string;
	readonly local: string;
	readonly remote: string;
	readonly original: string;
	readonly captured: string;
	readonly now: string;
}

const SIDECAR = {uid: 1337, gid: 1337};

function sidecar(pod: Pod, annotations: Readonly<Record<string, string>> = {}, extra: object = {}): object {
	return {
		name: `test/${pod.name}`, netns: pod.netns, mode: 'sidecar',
		annotations: Object.fromEntries(Object.entries(annotations).map(([name, value]) => [`traffic.sidecar.istio.io/${name}`, value])),
		...extra,
	};
}

/** Relayed: the server sees another socket than the application's. */
const isRelayed = ({local, hello}: ClientResult) => hello !== null && hello.peer !== local;

/** A client that holds its connection, and echoes once more when it is told to. */
async function hold(pod: Pod, to: string): Promise<Running> {
	const running = pod.startClients([to], ['--hold']);
	await running.until('connected', () => running.stdout.includes('\n'));
	return running;
}

async function isAlive(running: Running): Promise<boolean> {
	const before = running.lines().length;
	running.child.stdin!.write('\n');
	await running.until('answer', () => running.lines().length > before);
	return (running.lines().at(-1) as {readonly ok?: number}).ok === 1;
}

test.serial('a changed policy is for new connections; those that run go on as they are', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	const to = `${far.ipv4}:8080`;
	await far.server(to);
	const proxy = await pod.ztunnel(['--sidecar'], SIDECAR);
	const agent = await world.agent([sidecar(pod)]);
	const captured = await hold(pod, to);
	t.true(isRelayed(captured.lines<ClientResult>()[0]!));

	world.writePods([sidecar(pod, {excludeOutboundPorts: '8080'})]);
	await agent.says(/update test\/pod/);
	const direct = await hold(pod, to);
	t.false(isRelayed(direct.lines<ClientResult>()[0]!));
	t.true(await isAlive(captured), 'what was captured stays with the proxy');

	const mark = agent.running.stderr.length;
	world.writePods([sidecar(pod)]);
	await agent.says(/update test\/pod/, mark);
	t.true(isRelayed(pod.client(to)));
	t.true(await isAlive(direct), 'what was direct stays direct');
	t.true(await isAlive(captured));
	t.deepEqual(world.json<SocketRow[]>('sockets', 'test/pod', '--missed').map(({remote, now}) => [remote, now]), [[to, 'redirected']]);
	await proxy.stop('SIGKILL');
});

test.serial('while lists are replaced again and again, no connection meets half of one', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	const to = `${far.ipv4}:8080`;
	await far.server(to);
	await pod.ztunnel(['--sidecar', '--brief'], SIDECAR);
	// Captured by a port in one policy, by a range in the other, and by what is common to them never.
	const filler = (octet: number) => Array.from({length: 300}, (_, index) => `172.${octet}.${index >> 8}.${index & 0xff}/32`).join(',');
	const policies = [
		{includeOutboundIPRanges: filler(20), includeOutboundPorts: '8080'},
		{includeOutboundIPRanges: `${filler(21)},${far.ipv4}/32`, includeOutboundPorts: '9999'},
	];
	const agent = await world.agent([sidecar(pod, policies[0])]);
	const clients = pod.startClients([to], ['--count', '10000', '--parallel', '2']);
	let changes = 0;
	while (!clients.hasEnded) {
		const mark = agent.running.stderr.length;
		world.writePods([sidecar(pod, policies[++changes % 2])]);
		await agent.says(/update test\/pod/, mark);
	}

	const result = clients.lines<ManyResult>().at(-1)!;
	t.deepEqual([result.ok, result.failed, result.wrong_peer], [10_000, 0, 0]);
	t.true(changes > 5, `${changes} changes`);
	t.log(`${changes} changes of policy`);
	const {reasons} = world.json<Array<{reasons: Readonly<Record<string, number>>}>>('pods')[0]!;
	t.is(reasons['bypass_not_included'], 0, 'no connection went past the proxy');
	t.is(reasons['redirected'], 10_000);
});

test.serial('an annotation that cannot be read is reported on the pod, and what was captured stays so', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	const to = `${far.ipv4}:8080`;
	await far.server(to);
	await pod.ztunnel(['--sidecar'], SIDECAR);
	const agent = await world.agent([sidecar(pod)]);
	world.writePods([sidecar(pod, {excludeOutboundIPRanges: '10.0.0.0/8,10.300.0.0/16'})]);
	await agent.says(/pod test\/pod.*excludeOutboundIPRanges.*10\.300\.0\.0\/16/);
	t.is((await agent.get('/readyz')).status, 503);
	t.true(isRelayed(pod.client(to)), 'the good part of the list is not used either');
	world.writePods([sidecar(pod, {excludeOutboundIPRanges: '10.0.0.0/8'})]);
	await agent.says(/update test\/pod/);
	t.false(isRelayed(pod.client(to)));
	t.is((await agent.get('/readyz')).status, 200);
});

test.serial('labels decide with mode auto, and a pod that leaves is plain again, in and out', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	await far.server(`${far.ipv4}:8080`);
	await pod.server(`${pod.ipv4}:8081`);
	await pod.ztunnel();
	const entry = (labels: object, namespaceLabels: object) => ({name: 'test/pod', netns: pod.netns, mode: 'auto', labels, namespaceLabels});
	const ambient = {'istio.io/dataplane-mode': 'ambient'};
	const agent = await world.agent([entry({}, ambient)]);
	const own = pod.must('ip', 'rule').includes('0x111');
	t.true(own);
	t.true(isRelayed(pod.client(`${far.ipv4}:8080`)));
	t.true(isRelayed(far.client(`${pod.ipv4}:8081`)));

	world.writePods([entry({'istio.io/dataplane-mode': 'none'}, ambient)]);
	await agent.says(/remove test\/pod/);
	await agent.says(/pod test\/pod is not captured: its label istio\.io\/dataplane-mode is "?'?none/);
	t.false(isRelayed(pod.client(`${far.ipv4}:8080`)));
	t.false(isRelayed(far.client(`${pod.ipv4}:8081`)));
	t.false(pod.must('ip', 'rule').includes('0x111'));
	t.is(world.json<Array<{entries?: number; name: string}>>('map', 'list').find(({name}) => name === 'addresses')!.entries, 0);
});

test.serial('connections older than enrolment are shown, and reset when asked for, in both directions and families', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	await far.server(`${far.ipv4}:8080`, `[${far.ipv6}]:8080`);
	await pod.server('0.0.0.0:8081', `[${pod.ipv6}]:8081`);
	const held = [await hold(pod, `${far.ipv4}:8080`), await hold(pod, `[${far.ipv6}]:8080`), await hold(far, `${pod.ipv4}:8081`), await hold(far, `[${pod.ipv6}]:8081`)];
	const local = await hold(pod, '127.0.0.1:8081');
	await pod.ztunnel();
	await world.agent([{name: 'test/pod', netns: pod.netns, mode: 'ambient'}]);
	const fresh = await hold(pod, `${far.ipv4}:8080`);

	const missed = () => world.json<SocketRow[]>('sockets', 'test/pod', '--missed');
	t.deepEqual(missed().map(({direction, now}) => `${direction} ${now}`).sort(), ['in steered', 'in steered', 'out redirected', 'out redirected']);
	const all = world.json<SocketRow[]>('sockets', 'test/pod');
	t.true(all.some(({direction, captured, original}) => direction === 'out' && captured === 'yes' && original === `${far.ipv4}:8080`), 'the fresh one is captured');
	for (const each of held) {
		t.true(await isAlive(each));
	}

	t.regex(world.sidestep('sockets', 'test/pod', '--reset').stderr, /reset 4 connections/);
	for (const each of held) {
		t.false(await isAlive(each));
	}

	t.true(await isAlive(fresh));
	t.true(await isAlive(local));
	await eventually('none is missed any more', () => missed().length === 0);
	t.regex(world.sidestep('sockets', 'test/nobody').stderr, /no pod test\/nobody is enrolled/);
});

test.serial('with --reset-older the agent does so when it enrols a pod', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	await far.server(`${far.ipv4}:8080`);
	const old = await hold(pod, `${far.ipv4}:8080`);
	await pod.ztunnel();
	const agent = await world.agent([{name: 'test/pod', netns: pod.netns, mode: 'ambient'}], ['--reset-older', '--resync', '200']);
	await agent.says(/reset 1 connections of test\/pod/);
	t.false(await isAlive(old));
	const fresh = await hold(pod, `${far.ipv4}:8080`);
	const mark = agent.running.stderr.length;
	await eventually('two more rounds', async () => Number(/sidestep_reconciles_total\{result="ok"\} (\d+)/.exec((await agent.get('/metrics')).body)?.[1]) > 4);
	t.true(await isAlive(fresh));
	t.false(agent.running.stderr.slice(mark).includes('reset'));
});

test.serial('explain says what a real connection then meets', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	const proxy = await pod.ztunnel(['--sidecar'], SIDECAR);
	await world.agent([sidecar(pod, {excludeOutboundPorts: '3306', excludeOutboundIPRanges: '10.96.0.0/12', includeInboundPorts: '8081'}, {dns: true})]);
	const explain = (...args: readonly string[]) => world.json<Array<{decision: string}>>('explain', 'test/pod', ...args)[0]!.decision;
	t.is(explain('--to', `${far.ipv4}:8080`), 'redirected');
	t.is(explain('--to', `[${far.ipv6}]:8080`), 'redirected');
	t.is(explain('--to', '10.97.0.1:80'), 'bypass_range');
	t.is(explain('--to', '10.97.0.1:3306'), 'bypass_port');
	t.is(explain('--to', `${far.ipv4}:8080`, '--uid', '1337'), 'bypass_uid');
	t.is(explain('--to', `${pod.ipv4}:8080`, '--uid', '1337'), 'redirected_inbound');
	t.is(explain('--to', '10.96.0.10:53', '--udp'), 'redirected_dns');
	t.is(explain('--to', '10.96.0.10:54', '--udp'), 'not tcp, nor captured dns');
	t.is(explain('--to', '127.0.0.1:80'), 'bypass_local');
	t.is(explain('--to', '0.0.0.0:80'), 'bypass_local');
	t.is(explain('--in', '--from', `${far.ipv4}:40000`, '--to', `${pod.ipv4}:8081`), 'steered');
	t.is(explain('--in', '--from', `${far.ipv4}:40000`, '--to', `${pod.ipv4}:8082`), 'inbound_bypass_not_included');
	t.regex(explain('--in', '--to', '10.99.0.1:8081'), /no pod is known by this address/);
	await proxy.stop('SIGKILL');
	t.is(explain('--in', '--from', `${far.ipv4}:40000`, '--to', `${pod.ipv4}:8081`), 'inbound_refused');
	t.regex(world.sidestep('explain', 'test/pod', '--to', '10.0.0.1').stderr, /Expected an address and a port/);
	t.is(world.sidestep('explain', 'test/nobody', '--to', '10.0.0.1:80').code, 1);
});

test.serial('after a restart of the agent a pod can be enrolled, inbound too', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	await pod.server(`${pod.ipv4}:8081`);
	await pod.ztunnel();
	const first = await world.agent([]);
	await first.running.stop();
	const second = world.startAgent();
	await second.ready();
	world.writePods([{name: 'test/pod', netns: pod.netns, mode: 'ambient'}]);
	await second.says(/enrol test\/pod/);
	await second.ready();
	t.true(isRelayed(far.client(`${pod.ipv4}:8081`)));
});

test.serial('what belongs to lo is not to be reached from outside, nor believed', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const [sidecarPod, ambientPod] = [world.pod('sidecar'), world.pod('ambient')];
	for (const pod of [sidecarPod, ambientPod]) {
		await pod.server('[::]:8080');
	}

	await sidecarPod.ztunnel(['--sidecar'], SIDECAR);
	await ambientPod.ztunnel();
	await world.agent([sidecar(sidecarPod), {name: 'test/ambient', netns: ambientPod.netns, mode: 'ambient'}]);
	far.must('ip', '-6', 'route', 'add', '::6/128', 'via', sidecarPod.ipv6);
	t.is(far.client('[::6]:8080', ['--timeout', '700']).hello, null, 'not past the proxy by way of ::6');

	far.must('ip', '-6', 'route', 'del', '::6/128');
	far.must('ip', '-6', 'addr', 'add', '::6/128', 'dev', 'eth0', 'nodad');
	ambientPod.must('ip', '-6', 'route', 'add', '::6/128', 'via', far.ipv6);
	far.client(`[${ambientPod.ipv6}]:8080`, ['--bind', '[::6]:0', '--timeout', '700']);
	const {reasons} = world.json<Array<{name: string; reasons: Readonly<Record<string, number>>}>>('pods').find(({name}) => name === 'test/ambient')!;
	t.true(reasons['steered']! > 0, 'a client that calls itself ::6 meets the proxy');
});

test.serial('pods that share an address are both captured; what arrives for it is refused, or goes to the one that names it', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pods = [world.pod('a', {more: ['172.17.0.1']}), world.pod('b', {more: ['172.17.0.1']})];
	await far.server(`${far.ipv4}:8080`);
	for (const pod of pods) {
		await pod.ztunnel();
		await pod.server('0.0.0.0:8081');
	}

	const entry = (pod: Pod, extra: object = {}) => ({name: `test/${pod.name}`, netns: pod.netns, mode: 'ambient', ...extra});
	const agent = await world.agent(pods.map(pod => entry(pod)));
	await agent.says(/pods test\/a, test\/b have the same address 172\.17\.0\.1\/128: what arrives for it is refused/);
	for (const pod of pods) {
		t.true(isRelayed(pod.client(`${far.ipv4}:8080`)));
		t.true(isRelayed(far.client(`${pod.ipv4}:8081`)));
	}

	far.must('ip', 'route', 'add', '172.17.0.1', 'via', pods[0]!.ipv4);
	t.is(far.client('172.17.0.1:8081').outcome, 'ECONNREFUSED');
	world.writePods([entry(pods[0]!, {ips: ['172.17.0.1', pods[0]!.ipv6]}), entry(pods[1]!)]);
	await agent.says(/taken to be for test\/a, which names it in ips/);
	t.true(isRelayed(far.client('172.17.0.1:8081')));
});

test.serial('a pod whose namespace has ended gives its address to the next one', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	const entry = {name: 'test/old', netns: '/run/netns/never', mode: 'ambient'};
	const old = `${world.id}-old`;
	must('ip', 'netns', 'add', old);
	must('ip', '-n', old, 'link', 'add', 'eth0', 'type', 'bridge');
	must('ip', '-n', old, 'addr', 'add', `${pod.ipv4}/24`, 'dev', 'eth0');
	must('ip', '-n', old, 'link', 'set', 'eth0', 'up');
	const agent = await world.agent([{...entry, netns: `/run/netns/${old}`}]);
	must('ip', 'netns', 'del', old);
	await pod.server(`${pod.ipv4}:8081`);
	await pod.ztunnel();
	const mark = agent.running.stderr.length;
	world.writePods([{...entry, netns: `/run/netns/${old}`}, {name: 'test/new', netns: pod.netns, mode: 'ambient'}]);
	await agent.says(/enrol test\/new/, mark);
	t.regex(agent.running.stderr.slice(mark), /remove test\/old/);
	await eventually('inbound is captured', () => isRelayed(far.client(`${pod.ipv4}:8081`)));
});

test.serial('the exempt proxy\'s own connections are never taken for missed ones', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const [byGid, byCgroup] = [world.pod('gid'), world.pod('cgroup')];
	await far.server(`${far.ipv4}:8080`);
	const cgroup = world.subCgroup('proxy');
	const held = [
		byGid.startClients([`${far.ipv4}:8080`], ['--hold'], {gid: 1337}),
		byCgroup.startClients([`${far.ipv4}:8080`], ['--hold'], {cgroup}),
	];
	for (const each of held) {
		await each.until('connected', () => each.stdout.includes('\n'));
	}

	const entry = (pod: Pod, exempt: object) => ({name: `test/${pod.name}`, netns: pod.netns, proxy: {port: 15_001}, exempt});
	await world.agent([entry(byGid, {gids: [1337]}), entry(byCgroup, {cgroups: [cgroup]})], ['--reset-older']);
	t.deepEqual(world.json<SocketRow[]>('sockets', '--missed'), []);
	for (const each of held) {
		t.true(await isAlive(each));
	}
});

test.serial('when their pod leaves ambient mode, connections with a kept source go on over IPv4, and are reset over IPv6', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	await pod.server(`${pod.ipv4}:8081`, `[${pod.ipv6}]:8081`);
	await pod.ztunnel();
	const agent = await world.agent([{name: 'test/pod', netns: pod.netns, mode: 'ambient'}]);
	const inside = [await hold(far, `${pod.ipv4}:8081`), await hold(far, `[${pod.ipv6}]:8081`)];
	for (const each of inside) {
		t.true(isRelayed(each.lines<ClientResult>()[0]!));
	}

	const [ipv4, ipv6] = inside;
	world.writePods([sidecar(pod)]);
	await agent.says(/update test\/pod/);
	t.true(await isAlive(ipv4!));
	t.false(await isAlive(ipv6!), 'it is told');

	world.writePods([]);
	await agent.says(/remove test\/pod/);
	t.false(pod.must('ip', 'rule').includes('0x111'));
	t.true(await isAlive(ipv4!));
});

test.serial('a route of somebody else\'s in table 100 is reported, and not taken for ours', async t => {
	const world = World.create(t);
	const pod = world.pod('pod');
	pod.must('ip', 'route', 'add', 'default', 'via', '10.77.0.1', 'table', '100');
	world.writePods([{name: 'test/pod', netns: pod.netns, mode: 'ambient'}]);
	const agent = world.startAgent();
	await agent.says(/ip -4 route local default dev lo table 100` cannot be made, as something else is in its place/);
	t.is((await agent.get('/readyz')).status, 503);
});
