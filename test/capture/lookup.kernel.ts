/** The sk_lookup program by BPF_PROG_TEST_RUN: what each packet without a socket meets, and which listener it is given. */
import test, {type ExecutionContext} from 'ava';
import {load} from '../../src/loader/datapath.js';
import {takeWriterLock} from '../../src/loader/lock.js';
import {PinLayout} from '../../src/loader/paths.js';
import {addressToBytes} from '../../src/maps/address.js';
import {sumCounters} from '../../src/maps/schema.js';
import {native, type NetNs} from '../../src/native.js';
import {applyChange, readKernel} from '../../src/redirect/apply.js';
import type {Capture} from '../../src/redirect/capture.js';
import {plan} from '../../src/redirect/plan.js';
import {compilePolicy} from '../../src/redirect/policy.js';
import {World} from '../helpers/world.js';

const AF_INET = 2;
const AF_INET6 = 10;
const TCP = 6;
const UDP = 17;
const SK_PASS = 1;
const INBOUND_PORT = 15_006;

interface Packet {
	readonly protocol?: number;
	readonly from: string;
	readonly fromPort?: number;
	readonly to: string;
	readonly port: number;
}

/** struct bpf_sk_lookup (uapi/linux/bpf.h). ingress_ifindex has to be 0 in a test run; the differential test has excluded interfaces. */
function contextOf({protocol = TCP, from, fromPort = 40_000, to, port}: Packet): Uint8Array {
	const bytes = new Uint8Array(72);
	const view = new DataView(bytes.buffer);
	const ipv6 = to.includes(':');
	view.setUint32(8, ipv6 ? AF_INET6 : AF_INET, true);
	view.setUint32(12, protocol, true);
	for (const [address, at4, at6] of [[from, 16, 20], [to, 40, 44]] as const) {
		const all = addressToBytes(address);
		bytes.set(ipv6 ? all : all.subarray(12), ipv6 ? at6 : at4);
	}

	view.setUint16(36, fromPort);
	view.setUint32(60, port, true);
	return bytes;
}

const ALL: Capture = {
	mode: 'sidecar',
	exempt: {marks: [], uids: [], gids: [], cgroups: []},
	outbound: {port: 15_001, excludePorts: [], includePorts: [], excludeRanges: [], includeRanges: '*'},
	inbound: {port: INBOUND_PORT, includePorts: '*', excludePorts: [15_008, 9090], passNode: false},
	keepSource: false,
	excludeInterfaces: [],
	proxy: {uid: 1337, gid: 1337},
};
const LIST: Capture = {...ALL, inbound: {port: INBOUND_PORT, includePorts: [8080, 15_008], excludePorts: [15_008], passNode: false}};

type Verdict = 'steered' | 'pass' | 'drop';
interface Row extends Packet {
	readonly title: string;
	readonly policy?: 'list';
	readonly verdict: Verdict;
	/** The counter that moves; none for what is not the pod's, or not TCP. */
	readonly reason?: string;
}

const FAR = {from: '10.44.0.9', to: '10.44.0.2'};
const FAR6 = {from: 'fd44::9', to: 'fd44::2'};
const ROWS: readonly Row[] = [
	{title: 'from outside', ...FAR, port: 8080, verdict: 'steered', reason: 'steered'},
	{title: 'from outside, IPv6', ...FAR6, port: 8080, verdict: 'steered', reason: 'steered'},
	{title: 'a port that nobody serves', ...FAR, port: 1, verdict: 'steered', reason: 'steered'},
	{title: 'the proxy\'s own port', ...FAR, port: INBOUND_PORT, verdict: 'steered', reason: 'steered'},
	{title: 'an address of a prefix that is routed to the pod', from: '10.44.0.9', to: '10.50.7.7', port: 80, verdict: 'steered', reason: 'steered'},
	{title: 'the tunnel', ...FAR, port: 15_008, verdict: 'pass', reason: 'inbound_bypass_port'},
	{title: 'an excluded port', ...FAR, port: 9090, verdict: 'pass', reason: 'inbound_bypass_port'},
	{title: 'an excluded port, IPv6', ...FAR6, port: 9090, verdict: 'pass', reason: 'inbound_bypass_port'},
	{title: 'from an address of the pod', from: '10.44.0.2', to: '10.44.0.2', port: 8080, verdict: 'pass', reason: 'inbound_bypass_own'},
	{title: 'from an address of the pod, IPv6', from: 'fd44::2', to: 'fd44::2', port: 8080, verdict: 'pass', reason: 'inbound_bypass_own'},
	{title: 'from loopback', from: '127.0.0.6', to: '10.44.0.2', port: 8080, verdict: 'pass', reason: 'inbound_bypass_own'},
	{title: 'from ::6', from: '::6', to: 'fd44::2', port: 8080, verdict: 'pass', reason: 'inbound_bypass_own'},
	{title: 'to loopback', from: '127.0.0.1', to: '127.0.0.1', port: 8080, verdict: 'pass'},
	{title: 'to loopback, IPv6', from: '::1', to: '::1', port: 8080, verdict: 'pass'},
	{title: 'UDP', ...FAR, protocol: UDP, port: 8080, verdict: 'pass'},
	{title: 'noted as a connection of the node', ...FAR, fromPort: 41_000, port: 8080, verdict: 'pass', reason: 'inbound_bypass_node'},
	{title: 'the same from another port', ...FAR, fromPort: 41_001, port: 8080, verdict: 'steered', reason: 'steered'},
	{title: 'an address that no pod is known by', from: '10.44.0.9', to: '10.44.0.77', port: 8080, verdict: 'drop'},
	{title: 'a link-local address', from: 'fe80::9', to: 'fe80::2', port: 8080, verdict: 'drop'},
	{title: 'listed', policy: 'list', ...FAR, port: 8080, verdict: 'steered', reason: 'steered'},
	{title: 'not listed', policy: 'list', ...FAR, port: 8081, verdict: 'pass', reason: 'inbound_bypass_not_included'},
	{title: 'the tunnel, listed', policy: 'list', ...FAR, port: 15_008, verdict: 'pass', reason: 'inbound_bypass_port'},
];

/** Each at an address of its own, which the namespace need not have: a test run cannot choose among those of one SO_REUSEPORT group. */
function listen(netns: NetNs, address: string): number {
	const ipv6 = address.includes(':');
	const fd = netns.socket(ipv6 ? AF_INET6 : AF_INET, 1, 0);
	const bytes = new Uint8Array(ipv6 ? 28 : 16);
	new DataView(bytes.buffer).setUint16(0, ipv6 ? AF_INET6 : AF_INET, true);
	new DataView(bytes.buffer).setUint16(2, INBOUND_PORT);
	const all = addressToBytes(address === '::' ? '' : address);
	bytes.set(ipv6 ? all : all.subarray(12), ipv6 ? 8 : 4);
	native.setsockopt(fd, 0, 15, Uint8Array.of(1, 0, 0, 0)); // IP_FREEBIND
	if (address !== '::' && ipv6) {
		native.setsockopt(fd, 41, 26, Uint8Array.of(1, 0, 0, 0)); // IPV6_V6ONLY
	}

	native.bind(fd, bytes);
	native.listen(fd, 8);
	return fd;
}

function cookieOf(fd: number): bigint {
	return Buffer.from(native.getsockopt(fd, 1, 57, 8)).readBigUInt64LE(); // SO_COOKIE
}

function setUp(t: ExecutionContext) {
	const world = World.create(t);
	const lock = takeWriterLock(new PinLayout(world.bpffs, 2));
	const {datapath} = load(lock, {cgroup: world.cgroup});
	const netns = native.createNetns();
	world.onEnd(() => {
		netns.close();
		datapath.close();
		lock.release();
	});
	const cookie = netns.cookie();
	const inbound = datapath.programs.get('inbound')!;
	return {
		datapath,
		netns,
		findListeners: () => netns.runIterator(datapath.programs.get('find_listeners')!),
		enrol(capture: Capture) {
			const policy = compilePolicy({name: 'test/pod', capture}, {
				cookie, device: 4n, inode: 1n, addresses: ['10.44.0.2', 'fd44::2'],
				localRoutes: [
					{address: '10.44.0.2', bits: 32, isUnicast: true}, {address: 'fd44::2', bits: 128, isUnicast: true}, {address: '127.0.0.0', bits: 8, isUnicast: true},
					{address: '10.50.0.0', bits: 16, isUnicast: true}, {address: 'fe80::2', bits: 128, isUnicast: true}, {address: '10.44.0.255', bits: 32, isUnicast: false},
				],
				routes: [], interfaces: [], cgroups: [],
			});
			for (const change of plan(readKernel(datapath.maps), [policy])) {
				applyChange(datapath, change);
			}
		},
		reasons: () => sumCounters(datapath.schema, datapath.maps.counters.getAll(cookie) ?? []),
		send(packet: Packet): {verdict: Verdict; listener: bigint} {
			const {returnValue, context} = inbound.testRun({context: contextOf(packet)});
			const listener = Buffer.from(context).readBigUInt64LE(0);
			return {verdict: returnValue !== SK_PASS ? 'drop' : listener === 0n ? 'pass' : 'steered', listener};
		},
	};
}

test('each packet meets what its row says, and its counter moves', t => {
	const {datapath, netns, enrol, findListeners, reasons, send} = setUp(t);
	const listener = listen(netns, '::');
	enrol(ALL);
	findListeners();
	datapath.maps.passes.set({client: '10.44.0.9', server: '10.44.0.2', clientPort: 41_000, serverPort: 8080}, {reason: 'REASON_INBOUND_BYPASS_NODE'});
	for (const {title, policy, verdict, reason, ...packet} of ROWS) {
		enrol(policy === 'list' ? LIST : ALL);
		const before = reasons();
		const unknown = datapath.maps.node.get(0)!.unknownAddresses;
		const seen = send(packet);
		t.is(seen.verdict, verdict, title);
		t.is(seen.listener, verdict === 'steered' ? cookieOf(listener) : 0n, title);
		const moved = [...reasons()].filter(([name, count]) => count !== before.get(name)).map(([name]) => name);
		t.deepEqual(moved, reason === undefined ? [] : [reason], title);
		t.is(datapath.maps.node.get(0)!.unknownAddresses - unknown, verdict === 'drop' ? 1n : 0n, title);
	}

	native.closeFd(listener);
});

test('listeners are found once each; a family without one is refused; of several that die, those that live go on', t => {
	const {datapath, netns, enrol, findListeners, reasons, send} = setUp(t);
	const ipv4 = {...FAR, port: 80};
	const ipv6 = {...FAR6, port: 80};
	enrol(ALL);
	const slots = () => datapath.rawMaps.get('listeners')!.count();

	t.is(send(ipv4).verdict, 'drop');
	t.is(reasons().get('inbound_refused'), 1n);

	const first = listen(netns, '10.44.0.2');
	findListeners();
	t.is(send(ipv4).listener, cookieOf(first));
	t.is(send(ipv6).verdict, 'drop', 'an IPv4 listener is not for IPv6');

	const second = listen(netns, 'fd44::2');
	findListeners();
	findListeners();
	t.is(slots(), 2, 'each has one slot however often they are looked for');
	t.is(send(ipv4).listener, cookieOf(first));
	t.is(send(ipv6).listener, cookieOf(second));

	const third = listen(netns, '10.44.0.3');
	const fourth = listen(netns, 'fd44::3');
	findListeners();
	t.is(slots(), 4);
	native.closeFd(first);
	native.closeFd(fourth);
	t.is(slots(), 2, 'an entry goes with its socket');
	t.is(send(ipv4).listener, cookieOf(third));
	t.is(send(ipv6).listener, cookieOf(second));
	native.closeFd(second);
	native.closeFd(third);
	t.is(send(ipv4).verdict, 'drop');
	t.is(send(ipv6).verdict, 'drop');
});

test('with more listeners than slots the connections still go through, and it is counted', t => {
	const {datapath, netns, enrol, findListeners, reasons, send} = setUp(t);
	enrol(ALL);
	const listeners = Array.from({length: 18}, (_, index) => listen(netns, `10.44.1.${index}`));
	findListeners();
	t.is(datapath.rawMaps.get('listeners')!.count(), 16);
	t.is(reasons().get('listener_lost'), 2n);
	t.is(send({...FAR, port: 80}).verdict, 'steered');
	const {keys, values, count} = datapath.rawMaps.get('listeners')!.entries();
	const inMap = new Set(Array.from({length: count}, (_, index) => Buffer.from(values).readBigUInt64LE(index * 8)));
	t.is(keys.length, count * 16);
	const [kept, left] = [listeners.filter(fd => inMap.has(cookieOf(fd))), listeners.filter(fd => !inMap.has(cookieOf(fd)))];
	t.deepEqual([kept.length, left.length], [16, 2]);
	for (const fd of kept) {
		native.closeFd(fd);
	}

	t.is(send({...FAR, port: 80}).verdict, 'drop', 'until the next resync looks');
	findListeners();
	t.is(send({...FAR, port: 80}).verdict, 'steered');
	for (const fd of left) {
		native.closeFd(fd);
	}
});
