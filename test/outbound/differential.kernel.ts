/**
The same client action in two sibling pods, one under real iptables, one under sidestep: the application, the proxy and the peer have to see the same.
*/
import {fileURLToPath} from 'node:url';
import test from 'ava';
import {PROXY_GID, PROXY_MARK, PROXY_PORT, PROXY_UID, captureByIptables, captureBySidestep} from '../helpers/capture.js';
import {eventually, type Running} from '../helpers/process.js';
import {World, type As, type ClientResult, type Pod, type ProxyLine} from '../helpers/world.js';

const CHILD = fileURLToPath(new URL('../helpers/reuse-child.js', import.meta.url));

interface Case {
	readonly title: string;
	/** `FAR4`, `FAR6`, `OWN4`, `OWN6` stand for the pods' addresses. */
	readonly to: string;
	readonly options?: readonly string[];
	readonly as?: As;
	/** What iptables gives, as a check that the case tests what it says: relayed by the proxy, direct, or an error. */
	readonly expect: 'relayed' | 'direct' | 'fails';
	/** By default whatever is relayed, and what fails behind the proxy. */
	readonly reachesProxy?: boolean;
	/** Differences that the README names: sidestep relays what iptables does not; or getpeername shows the proxy. */
	readonly differs?: 'relayed' | 'peer';
}

const CASES: readonly Case[] = [
	{title: 'IPv4', to: 'FAR4:8080', expect: 'relayed'},
	{title: 'IPv6', to: '[FAR6]:8080', expect: 'relayed'},
	{title: 'IPv4 from an IPv6 socket', to: 'FAR4:8080', options: ['--family', 'mapped'], expect: 'relayed'},
	{title: 'non-blocking connect, IPv4', to: 'FAR4:8080', options: ['--nonblock'], expect: 'relayed'},
	{title: 'non-blocking connect, IPv6', to: '[FAR6]:8080', options: ['--nonblock'], expect: 'relayed'},
	{title: 'Fast Open by sendto', to: 'FAR4:8080', options: ['--tfo', 'sendto'], expect: 'relayed'},
	{title: 'Fast Open by sendto, IPv6', to: '[FAR6]:8080', options: ['--tfo', 'sendto'], expect: 'relayed'},
	{title: 'Fast Open by connect', to: 'FAR4:8080', options: ['--tfo', 'connect'], expect: 'relayed'},
	{title: 'Fast Open by connect, IPv6', to: '[FAR6]:8080', options: ['--tfo', 'connect'], expect: 'relayed'},
	{title: 'bound source address', to: 'FAR4:8080', options: ['--bind', 'OWN4:0'], expect: 'relayed'},
	{title: 'bound source address, IPv6', to: '[FAR6]:8080', options: ['--bind', '[OWN6]:0'], expect: 'relayed'},
	{title: 'bound source address and port', to: 'FAR4:8080', options: ['--bind', 'OWN4:40123'], expect: 'relayed'},
	{title: 'bound source port only', to: 'FAR4:8080', options: ['--bind', '0.0.0.0:40124'], expect: 'relayed'},
	{title: 'source bound to 127.0.0.1', to: 'FAR4:8080', options: ['--bind', '127.0.0.1:0'], expect: 'fails', reachesProxy: false},
	{title: 'source bound to 127.0.0.1, exempt', to: 'FAR4:8080', options: ['--bind', '127.0.0.1:0', '--mark', String(PROXY_MARK)], expect: 'fails', reachesProxy: false},
	{title: 'source bound to ::1', to: '[FAR6]:8080', options: ['--bind', '[::1]:0'], expect: 'relayed'},
	{title: 'SO_BINDTODEVICE eth0', to: 'FAR4:8080', options: ['--device', 'eth0'], expect: 'fails', reachesProxy: false, differs: 'relayed'},
	{title: 'SO_BINDTODEVICE eth0, IPv6', to: '[FAR6]:8080', options: ['--device', 'eth0'], expect: 'fails', reachesProxy: false, differs: 'relayed'},
	{title: 'nobody at the destination: the proxy still accepts', to: 'FAR4:9', expect: 'fails'},
	{title: 'a neighbour that does not exist', to: '10.77.0.250:80', expect: 'fails'},
	{title: 'exempt mark', to: 'FAR4:8080', options: ['--mark', String(PROXY_MARK)], expect: 'direct'},
	{title: 'exempt mark with other bits outside the mask', to: 'FAR4:8080', options: ['--mark', String(PROXY_MARK + 0x1000)], expect: 'direct'},
	{title: 'another mark', to: 'FAR4:8080', options: ['--mark', '1'], expect: 'relayed'},
	{title: 'exempt uid', to: 'FAR4:8080', as: {uid: PROXY_UID}, expect: 'direct'},
	{title: 'exempt uid, IPv6', to: '[FAR6]:8080', as: {uid: PROXY_UID}, expect: 'direct'},
	{title: 'exempt gid', to: 'FAR4:8080', as: {gid: PROXY_GID}, expect: 'direct'},
	{title: 'another uid and gid', to: 'FAR4:8080', as: {uid: 1000, gid: 1000}, expect: 'relayed'},
	{title: 'loopback', to: '127.0.0.1:8081', expect: 'direct'},
	{title: 'loopback elsewhere in 127/8', to: '127.9.9.9:8081', expect: 'direct'},
	{title: 'loopback, IPv6', to: '[::1]:8081', expect: 'direct'},
	{title: 'loopback from an IPv6 socket', to: '127.0.0.1:8081', options: ['--family', 'mapped'], expect: 'direct'},
	{title: 'the unspecified address', to: '0.0.0.0:8081', expect: 'direct'},
	{title: 'the unspecified address, IPv6', to: '[::]:8081', expect: 'direct'},
	{title: 'the pod\'s own address', to: 'OWN4:8081', expect: 'direct'},
	{title: 'the pod\'s own address, IPv6', to: '[OWN6]:8081', expect: 'direct'},
	{title: 'the pod\'s own address from an IPv6 socket', to: 'OWN4:8081', options: ['--family', 'mapped'], expect: 'direct'},
	{title: 'multicast', to: '224.0.0.1:80', expect: 'fails', reachesProxy: false},
	{title: 'limited broadcast', to: '255.255.255.255:80', expect: 'fails', reachesProxy: false},
	{title: 'the subnet\'s broadcast address', to: '10.77.0.255:80', expect: 'fails', reachesProxy: false},
	{title: 'MPTCP', to: 'FAR4:8080', options: ['--mptcp'], expect: 'relayed', differs: 'peer'},
	{title: 'MPTCP, IPv6', to: '[FAR6]:8080', options: ['--mptcp'], expect: 'relayed', differs: 'peer'},
];

interface Side {
	readonly pod: Pod;
	readonly proxy: Running;
}

/** What one side saw, with the pod's own address and random ports replaced. */
function view({pod}: Side, result: ClientResult, lines: readonly ProxyLine[]) {
	const plain = (text: string) => text
		.replaceAll(pod.ipv4, 'OWN4').replaceAll(new RegExp(`${pod.ipv6}(?![0-9a-f])`, 'g'), 'OWN6')
		.replaceAll(/:(?!40123|40124)[3-6]\d{4}\b/g, ':RANDOM');
	const unmapped = (text = '') => text.replace(/^\[::ffff:([\d.]+)]/, '$1');
	return {
		client: {
			// The server sees the application's own socket: nothing is in between.
			direct: result.hello !== null && unmapped(result.hello.peer) === unmapped(result.local),
			outcome: result.outcome, stage: result.stage, echo: result.echo, peer: plain(result.peer), local: plain(result.local),
			server: plain(result.hello?.server ?? ''), serverPeer: plain(result.hello?.peer ?? ''),
		},
		// Not the local address: 127.0.0.1 under REDIRECT, the pod's own under sidestep. README says so.
		proxy: lines.map(({peer, original_dst, answers}) => ({peer: plain(peer), original_dst: plain(original_dst ?? ''), answers: answers.map(answer => addressOnly(answer))})),
	};
}

/**
What a caller finds beyond the address differs, as the README says: iptables leaves those bytes as they were (0xaa here), sidestep clears them. Neither
writes anything else, and both give back the length that was asked with.
*/
function addressOnly({bytes = '', ...answer}: ProxyLine['answers'][number]) {
	const size = 2 * (answer.level === 'ip' ? 16 : 28);
	const rest = bytes.slice(size);
	return {...answer, address: bytes.slice(0, size), restIsClean: /^(?:(?:00)*|(?:aa)*)$/.test(rest)};
}

test.serial('under sidestep everyone sees what they see under iptables', async t => {
	t.timeout(120_000);
	const world = World.create(t);
	const far = world.pod('far');
	const theirs = world.pod('iptables');
	const ours = world.pod('sidestep');
	await far.server(`${far.ipv4}:8080`, `[${far.ipv6}]:8080`);
	const sides: Side[] = [];
	for (const pod of [theirs, ours]) {
		// Client and server, and without the cookie that a first connection would only ask for: data really goes with the SYN.
		pod.must('sysctl', '-qw', 'net.ipv4.tcp_fastopen=0x207');
		await pod.server('0.0.0.0:8081', '[::1]:8081', `[${pod.ipv6}]:8081`);
		sides.push({pod, proxy: await pod.proxy(['--listen', `[::]:${PROXY_PORT}`, '--mark', String(PROXY_MARK)])});
	}

	captureByIptables(theirs);
	await captureBySidestep(ours);

	for (const {title, to, options = [], as, expect, reachesProxy = expect !== 'direct', differs} of CASES) {
		const views = [];
		for (const side of sides) {
			const fill = (text: string) => text.replaceAll('FAR4', far.ipv4).replaceAll('FAR6', far.ipv6).replaceAll('OWN4', side.pod.ipv4).replaceAll('OWN6', side.pod.ipv6);
			const before = side.proxy.lines().length;
			const result = side.pod.client(fill(to), [...options.map(fill), '--timeout', '1500'], as);
			if (reachesProxy || (differs === 'relayed' && side.pod === ours)) {
				await eventually(`${title}: the proxy of ${side.pod.name} reports ${JSON.stringify(result)}`, () => side.proxy.lines().length > before, 10_000).catch(() => {});
			}

			views.push(view(side, result, side.proxy.lines<ProxyLine>().slice(before)));
		}

		const [reference, mine] = views;
		t.is(reference!.proxy.length, reachesProxy ? 1 : 0, `${title}: iptables did not do what the case is about: ${JSON.stringify(reference)}`);
		t.is(reference!.client.outcome === 'ok', expect !== 'fails', `${title}: ${JSON.stringify(reference)}`);
		t.is(reference!.client.direct, expect === 'direct', `${title}: ${JSON.stringify(reference)}`);
		if (differs === 'peer') {
			t.deepEqual({...mine, client: {...mine!.client, peer: ''}}, {...reference, client: {...reference!.client, peer: ''}}, title);
			t.regex(mine!.client.peer, /(?:OWN[46]\]?|^127\.[\d.]+):15001/, title);
		} else if (differs === 'relayed') {
			t.like(mine, {client: {outcome: 'ok', echo: true, peer: to.replace('FAR4', far.ipv4).replace('FAR6', far.ipv6)}, proxy: {length: 1}}, title);
		} else {
			t.deepEqual(mine, reference, title);
		}
	}

	for (const {pod} of sides) {
		const counters = pod.must('cat', '/proc/net/netstat').split('\n').filter(line => line.startsWith('TcpExt:')).map(line => line.split(' '));
		t.is(counters[1]![counters[0]!.indexOf('TCPFastOpenPassive')], '4', `${pod.name}: data came with the SYN in all four Fast Open cases`);
	}
});

test.serial('with no proxy a captured connection is refused, at once and in both ways of connecting, as under iptables', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const theirs = world.pod('iptables');
	const ours = world.pod('sidestep');
	await far.server(`${far.ipv4}:8080`, `[${far.ipv6}]:8080`);
	captureByIptables(theirs);
	await captureBySidestep(ours);
	for (const pod of [theirs, ours]) {
		for (const to of [`${far.ipv4}:8080`, `[${far.ipv6}]:8080`]) {
			for (const options of [[], ['--nonblock']]) {
				t.is(pod.client(to, options).outcome, 'ECONNREFUSED', `${pod.name} ${to} ${options.join('')}`);
			}
		}
	}

	const [{failed}] = world.json<[{failed: number}]>('pods');
	t.is(failed, 4);
	t.deepEqual(world.json('map', 'dump', 'handshakes'), [], 'nothing waits for a proxy that never came');
});

test.serial('a socket that is used again shows each time the peer of its last connect, as under iptables', async t => {
	const world = World.create(t);
	const far = world.pod('far', {more: ['10.77.0.170']});
	const theirs = world.pod('iptables');
	const ours = world.pod('sidestep');
	await far.server(`${far.ipv4}:8080`, '10.77.0.170:8080', `[${far.ipv6}]:8080`);
	for (const pod of [theirs, ours]) {
		await pod.server('127.0.0.1:8081', '[::1]:8081');
		// No proxy for IPv6: refused by the stack.
		await pod.proxy(['--listen', `0.0.0.0:${PROXY_PORT}`, '--mark', String(PROXY_MARK), '--brief']);
	}

	captureByIptables(theirs);
	await captureBySidestep(ours);
	const lists = [
		[`${far.ipv4} 8080`, 'unspec', '127.0.0.1 8081', 'unspec', '10.77.0.170 8080', '10.77.0.170 8080'],
		[`${far.ipv6} 8080`, '::1 8081', 'unspec', `${far.ipv6} 8080`, 'unspec', '::1 8081'],
	];
	const [reference, mine] = [theirs, ours].map(pod => pod.must(process.execPath, CHILD, JSON.stringify(lists)).trim().split('\n').map(line => JSON.parse(line) as string[]));
	t.deepEqual(reference, [
		[`ok ${far.ipv4}`, 'ok ENOTCONN', 'ok 127.0.0.1', 'ok ENOTCONN', 'ok 10.77.0.170', 'EISCONN 10.77.0.170'],
		['ECONNREFUSED ENOTCONN', 'ok ::1', 'ok ENOTCONN', 'ECONNREFUSED ENOTCONN', 'ok ENOTCONN', 'ok ::1'],
	]);
	t.deepEqual(mine, reference);
	t.deepEqual(world.json('map', 'dump', 'handshakes'), []);
});

test.serial('a pod without IPv6 gets ENETUNREACH for IPv6, as it does without capture', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('four', {ipv6: false});
	await far.server(`[${far.ipv6}]:8080`);
	t.is(pod.client(`[${far.ipv6}]:8080`).outcome, 'ENETUNREACH');
	await captureBySidestep(pod);
	t.is(pod.client(`[${far.ipv6}]:8080`).outcome, 'ENETUNREACH');
	const [{refused}] = world.json<[{refused: number}]>('pods');
	t.is(refused, 1);
});

test.serial('a proxy that listens on loopback only still sees the pod as its peer', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	await far.server(`${far.ipv4}:8080`, `[${far.ipv6}]:8080`);
	const proxy = await pod.proxy(['--listen', `127.0.0.1:${PROXY_PORT}`, '--listen', `[::1]:${PROXY_PORT}`, '--mark', String(PROXY_MARK), '--brief']);
	await world.agent([{name: 'test/pod', netns: pod.netns, proxy: {port: PROXY_PORT, addresses: ['127.0.0.1', '::1']}, exempt: {marks: ['0x539']}}]);
	t.is(pod.client(`${far.ipv4}:8080`).outcome, 'ok');
	t.is(pod.client(`[${far.ipv6}]:8080`).outcome, 'ok');
	t.is(pod.client(`${far.ipv4}:8080`, ['--family', 'mapped']).outcome, 'ok');
	const peers = () => proxy.lines<ProxyLine>().filter(line => line.peer).map(({peer}) => peer.replace(/:\d+$/, ''));
	await eventually('the proxy reports all three', () => peers().length === 3);
	t.deepEqual(peers(), [pod.ipv4, `[${pod.ipv6}]`, pod.ipv4]);
});

test.serial('a proxy in another namespace learns client and original destination', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	const proxyPod = world.pod('proxy');
	await far.server(`${far.ipv4}:8080`);
	const proxy = await proxyPod.proxy(['--listen', `${proxyPod.ipv4}:${PROXY_PORT}`, '--brief']);
	await world.agent([{name: 'test/pod', netns: pod.netns, proxy: {port: PROXY_PORT, addresses: [proxyPod.ipv4]}}]);
	const result = pod.client(`${far.ipv4}:8080`);
	t.is(result.outcome, 'ok');
	t.is(result.peer, `${far.ipv4}:8080`);
	const lines = () => proxy.lines<ProxyLine>().filter(({peer}) => peer);
	await eventually('the proxy reports', () => lines().length === 1);
	const [line] = lines();
	t.is(line!.original_dst, `${far.ipv4}:8080`);
	t.is(line!.peer, result.local);
	// Only an IPv4 proxy was named: IPv6 is refused, not passed.
	t.is(pod.client(`[${far.ipv6}]:8080`).outcome, 'ENETUNREACH');
});

test.serial('a process in an exempt cgroup, or below it, is left alone', async t => {
	const world = World.create(t);
	const far = world.pod('far');
	const pod = world.pod('pod');
	const exempt = world.subCgroup('proxy');
	const below = world.subCgroup('proxy/worker');
	const other = world.subCgroup('other');
	await far.server(`${far.ipv4}:8080`);
	await world.agent([{name: 'test/pod', netns: pod.netns, proxy: {port: PROXY_PORT}, exempt: {cgroups: [exempt]}}]);
	t.is(pod.client(`${far.ipv4}:8080`, [], {cgroup: exempt}).outcome, 'ok');
	t.is(pod.client(`${far.ipv4}:8080`, [], {cgroup: below}).outcome, 'ok');
	t.is(pod.client(`${far.ipv4}:8080`, [], {cgroup: other}).outcome, 'ECONNREFUSED');
	const [{reasons}] = world.json<[{reasons: Record<string, number>}]>('pods');
	t.is(reasons['bypass_cgroup'], 2);
	t.is(reasons['redirected'], 1);
});

test.serial('200 connections at once go through the proxy, to the right place', async t => {
	const world = World.create(t);
	const far = world.pod('far', {more: ['10.77.0.170']});
	const pod = world.pod('pod');
	const destinations = [`${far.ipv4}:8080`, `[${far.ipv6}]:8080`, '10.77.0.170:8081'];
	await far.server(...destinations);
	await pod.proxy(['--listen', `[::]:${PROXY_PORT}`, '--mark', String(PROXY_MARK), '--brief']);
	await captureBySidestep(pod);
	const result = await pod.clients(destinations, ['--count', '600', '--parallel', '200', '--timeout', '10000']);
	t.like(result, {ok: 600, failed: 0, wrong_peer: 0});
	const [{accepted}] = world.json<[{accepted: number}]>('pods');
	t.is(accepted, 600);
});

test.serial('a pod holds as many connections to each destination as it has ports: IPv4 as under iptables, IPv6 to all together, as the README says', async t => {
	const world = World.create(t);
	const PORTS = 20;
	const DESTINATIONS = 5;
	const addresses = Array.from({length: DESTINATIONS}, (_, index) => ({v4: `10.77.0.${200 + index}`, v6: `fd77::f${index}`}));
	const far = world.pod('far', {more: addresses.flatMap(({v4, v6}) => [v4, v6])});
	await far.server('0.0.0.0:8080', ...addresses.map(({v6}) => `[${v6}]:8080`));
	const pods = {iptables: world.pod('iptables'), sidestep: world.pod('sidestep')};
	for (const pod of Object.values(pods)) {
		pod.must('sysctl', '-qw', `net.ipv4.ip_local_port_range=50000 ${50_000 + PORTS - 1}`);
		await pod.proxy(['--listen', `[::]:${PROXY_PORT}`, '--no-relay']);
	}

	captureByIptables(pods.iptables);
	await captureBySidestep(pods.sidestep);
	const hold = (pod: Pod, to: readonly string[]) => {
		// 50 of 5 × 20 possible ones: the kernel looks for a free port by chance, and has to find one.
		const results = pod.connections(Array.from({length: 50}, (_, index) => to[index % DESTINATIONS]!), ['--timeout', '1000']);
		return results.filter(({stage}) => stage !== 'connect').length;
	};

	t.is(hold(pods.iptables, addresses.map(({v4}) => `${v4}:8080`)), 50);
	t.is(hold(pods.sidestep, addresses.map(({v4}) => `${v4}:8080`)), 50);
	t.is(hold(pods.iptables, addresses.map(({v6}) => `[${v6}]:8080`)), 50);
	t.is(hold(pods.sidestep, addresses.map(({v6}) => `[${v6}]:8080`)), PORTS);
});
