/**
The oracle of the generator tests, held against rows worked out by hand from Istio's rules; and what its generators reach.
*/
import test from 'ava';
import {addressToBytes, canonicalAddress} from '../../src/maps/address.js';
import type {Capture, Cidr} from '../../src/redirect/capture.js';
import {drawCapture, drawFlow, FACTS, randomOf, readContract, type Flow, type Outcome} from '../helpers/contract.js';

const EXEMPT = {marks: [], uids: [], gids: [], cgroups: []};
const EVERYTHING = {port: 15_001, excludePorts: [], includePorts: [], excludeRanges: [], includeRanges: '*'} as const;
const AMBIENT: Capture = {
	mode: 'ambient', exempt: {...EXEMPT, marks: [{value: 0x539, mask: 0xfff}, {value: 0x111, mask: 0xfff}]}, outbound: EVERYTHING,
	inbound: {port: 15_006, includePorts: '*', excludePorts: [15_008], passNode: true}, dns: {port: 15_053}, keepSource: true, excludeInterfaces: [],
};
const SIDECAR: Capture = {
	mode: 'sidecar', exempt: EXEMPT, outbound: EVERYTHING, inbound: {port: 15_006, includePorts: '*', excludePorts: [15_008, 15_020, 15_021, 15_090, 8081], passNode: false},
	keepSource: false, excludeInterfaces: ['net1'], proxy: {uid: 1337, gid: 1337},
};
const SIDECAR_DNS: Capture = {...SIDECAR, dns: {port: 15_053}};
const PROXY: Capture = {mode: 'proxy', exempt: {...EXEMPT, marks: [{value: 7, mask: 0xff}], uids: [1], gids: [2]}, outbound: EVERYTHING, keepSource: false, excludeInterfaces: []};
const {inbound: _, ...OUTBOUND_ONLY} = AMBIENT;
const {dns: __, ...WITHOUT_DNS} = AMBIENT;
const sidecarWith = (outbound: Partial<Capture['outbound']>): Capture => ({...SIDECAR, outbound: {...EVERYTHING, ...outbound}});
const sidecarPorts = (...includePorts: number[]): Capture => ({...SIDECAR, inbound: {port: 15_006, includePorts, excludePorts: [15_008], passNode: false}});
const tenEight: Cidr = {address: '10.0.0.0', bits: 8};
const loopback: Cidr = {address: '127.0.0.0', bits: 8};

/** `destination` is address:port. */
function out(destination: string, extra: Partial<Flow> & {from?: string} = {}): Flow {
	const {from, ...rest} = extra;
	return {...flowTo(destination), direction: 'out', ...(from === undefined ? {} : {source: {address: from, isBound: true}}), ...rest};
}

function arriving(destination: string, extra: Partial<Flow> = {}): Flow {
	return {...flowTo(destination), direction: 'in', source: {address: '10.44.0.9', isBound: true}, ...extra};
}

function flowTo(destination: string): Flow {
	const colon = destination.lastIndexOf(':');
	return {
		direction: 'out', protocol: 'tcp', destination: {address: destination.slice(0, colon), port: Number(destination.slice(colon + 1))},
		source: {address: '', isBound: false}, mark: 0, uid: 0, gid: 0, fromNode: false, interfaceExcluded: false,
	};
}

const udp = {protocol: 'udp'} as const;
const asUid = {uid: 1337} as const;
const asGid = {gid: 1337} as const;
const node = {fromNode: true} as const;

const row = test.macro({
	exec(t, capture: Capture, flow: Flow, outcome: Outcome) {
		t.is(readContract(capture, FACTS, flow), outcome);
	},
	title: (title = '', _capture: Capture, {protocol, destination: {address, port}}: Flow, outcome: Outcome) => `${title}: ${protocol} to ${address || '::'} port ${port}: ${outcome}`,
});

test('P2', row, AMBIENT, arriving('10.44.0.2:80'), 'inbound');
test('P2, IPv6', row, AMBIENT, arriving('fd44::2:80'), 'inbound');
test('P1', row, AMBIENT, arriving('10.44.0.2:80', node), 'pass');
test('P2, the tunnel', row, AMBIENT, arriving('10.44.0.2:15008'), 'pass');
test('P2, udp', row, AMBIENT, arriving('10.44.0.2:53', udp), 'pass');
test('P2, with bypass-inbound-capture', row, OUTBOUND_ONLY, arriving('10.44.0.2:80'), 'pass');
test('O2', row, AMBIENT, out('10.96.0.10:53', udp), 'dns');
test('O2, with the mark', row, AMBIENT, out('10.96.0.10:53', {...udp, mark: 0x539}), 'pass');
test('O2, over lo', row, AMBIENT, out('10.44.0.2:53', udp), 'pass');
test('O2, loopback that is not LO', row, AMBIENT, out('127.0.0.53:53', udp), 'pass');
test('O2, without DNS', row, WITHOUT_DNS, out('10.96.0.10:53', udp), 'pass');
test('O3', row, AMBIENT, out('10.96.0.10:53'), 'dns');
test('O3, own address', row, AMBIENT, out('10.44.0.2:53'), 'dns');
test('O3, loopback that is not LO', row, AMBIENT, out('127.0.0.53:53'), 'dns');
test('O3, LO', row, AMBIENT, out('127.0.0.1:53'), 'pass');
test('O3, LO, IPv6', row, AMBIENT, out('::1:53'), 'pass');
test('O3, with the mark', row, AMBIENT, out('10.44.0.2:53', {mark: 0x539}), 'pass');
test('O3, without DNS', row, WITHOUT_DNS, out('10.96.0.10:53'), 'outbound');
test('O5', row, AMBIENT, out('10.44.0.2:80'), 'pass');
test('O5, IPv6', row, AMBIENT, out('fd44::2:80'), 'pass');
test('O6', row, AMBIENT, out('10.96.0.1:443', {uid: 1337}), 'outbound');
test('O6, IPv6', row, AMBIENT, out('2001:db8::1:443'), 'outbound');
test('O6, IPv4 as an IPv6 socket writes it', row, AMBIENT, out('::ffff:10.96.0.1:443'), 'outbound');
test('O6, LO', row, AMBIENT, out('127.0.0.1:443'), 'pass');
test('O6, with the mark', row, AMBIENT, out('10.96.0.1:443', {mark: 0x539}), 'pass');
test('O6, with the other mark', row, AMBIENT, out('10.96.0.1:443', {mark: 0x111}), 'pass');
test('O6, with bits outside the mask', row, AMBIENT, out('10.96.0.1:443', {mark: 0xf0_00_05_39}), 'pass');
test('O6, with a bit inside the mask', row, AMBIENT, out('10.96.0.1:443', {mark: 0x538}), 'outbound');
test('O6, the tunnel', row, AMBIENT, out('10.96.0.1:15008'), 'outbound');
test('other udp', row, AMBIENT, out('10.96.0.1:54', udp), 'pass');
test('unspecified is loopback', row, AMBIENT, out('0.0.0.0:80'), 'pass');
test('unspecified is loopback, IPv6', row, AMBIENT, out(':::80'), 'pass');
test('unspecified is the bound source', row, AMBIENT, out('0.0.0.0:53', {from: '10.44.0.2'}), 'dns');
test('a group', row, AMBIENT, out('224.0.0.1:80'), 'pass');

test('A0', row, SIDECAR, out('10.96.0.1:80', {interfaceExcluded: true}), 'pass');
test('A1', row, sidecarWith({excludePorts: [80]}), out('10.96.0.1:80'), 'pass');
test('A1, another port', row, sidecarWith({excludePorts: [80]}), out('10.96.0.1:81'), 'outbound');
test('A1, the proxy to itself', row, sidecarWith({excludePorts: [80]}), out('10.44.0.2:80', asUid), 'pass');
test('A1, DNS', row, {...SIDECAR_DNS, outbound: {...EVERYTHING, excludePorts: [53]}}, out('10.96.0.10:53', udp), 'pass');
test('A2', row, SIDECAR, out('10.44.0.2:80', {...asUid, from: '127.0.0.6'}), 'pass');
test('A2, IPv6', row, SIDECAR, out('fd44::2:80', {...asUid, from: '::6'}), 'pass');
test('A2, ::6 is reached from itself', row, SIDECAR, out('::6:80', asUid), 'pass');
test('A2, 127.0.0.6 is reached from 127.0.0.1', row, SIDECAR, out('127.0.0.6:15002', asUid), 'inbound');
test('A3, Istio\'s own check', row, SIDECAR, out('127.0.0.6:15002', {...asUid, from: '127.0.0.1'}), 'inbound');
test('A3, own address', row, SIDECAR, out('10.44.0.2:80', asUid), 'inbound');
test('A3, own address, IPv6', row, SIDECAR, out('fd44::2:80', asUid), 'inbound');
test('A3, unspecified is the bound source', row, SIDECAR, out('0.0.0.0:80', {...asUid, from: '10.44.0.2'}), 'inbound');
test('A3, LO', row, SIDECAR, out('127.0.0.1:80', asUid), 'pass');
test('A3, the tunnel', row, SIDECAR, out('10.44.0.2:15008', asUid), 'pass');
test('A3, udp', row, SIDECAR, out('10.44.0.2:80', {...asUid, ...udp}), 'pass');
test('A3, port 53 without DNS', row, SIDECAR, out('10.44.0.2:53', asUid), 'inbound');
test('A3, port 53 with DNS', row, SIDECAR_DNS, out('10.44.0.2:53', asUid), 'pass');
test('A4, the application to itself', row, SIDECAR, out('10.44.0.2:80'), 'pass');
test('A4, the group cannot make up for it', row, SIDECAR, out('10.44.0.2:80', asGid), 'pass');
test('A4, own DNS server, tcp', row, SIDECAR_DNS, out('127.0.0.1:53'), 'dns');
test('A4, own DNS server, udp', row, SIDECAR_DNS, out('127.0.0.1:53', udp), 'dns');
test('A4, own DNS server, without DNS', row, SIDECAR, out('127.0.0.1:53', udp), 'pass');
test('A4, loopback included', row, sidecarWith({includeRanges: [loopback, tenEight]}), out('127.0.0.2:80'), 'outbound');
test('A4, loopback included, own address', row, sidecarWith({includeRanges: [loopback, tenEight]}), out('10.44.0.2:80'), 'outbound');
test('A4, loopback of the other family included', row, sidecarWith({includeRanges: [{address: '::1', bits: 128}, tenEight]}), out('10.44.0.2:80'), 'outbound');
test('A4, everything included', row, sidecarWith({includeRanges: [{address: '0.0.0.0', bits: 0}]}), out('10.44.0.2:80'), 'pass');
test('A5', row, SIDECAR, out('10.96.0.1:80', asUid), 'pass');
test('A5, DNS', row, SIDECAR_DNS, out('10.96.0.10:53', {...asUid, ...udp}), 'pass');
test('A6, loopback included', row, sidecarWith({includeRanges: [loopback]}), out('10.44.0.2:80', asGid), 'inbound');
test('A6, port 53 with DNS', row, SIDECAR_DNS, out('10.44.0.2:53', asGid), 'inbound');
test('A6, port 53 with DNS, LO', row, SIDECAR_DNS, out('127.0.0.1:53', asGid), 'pass');
test('A6, loopback included, the tunnel', row, sidecarWith({includeRanges: [loopback]}), out('10.44.0.2:15008', asGid), 'pass');
test('A8', row, SIDECAR, out('10.96.0.1:80', asGid), 'pass');
test('A8, DNS', row, SIDECAR_DNS, out('10.96.0.10:53', {...asGid, ...udp}), 'pass');
test('A10', row, SIDECAR_DNS, out('10.96.0.10:53', udp), 'dns');
test('A10, tcp', row, SIDECAR_DNS, out('2001:db8::53:53'), 'dns');
test('A10, before the ranges', row, {...SIDECAR_DNS, outbound: {...EVERYTHING, excludeRanges: [tenEight], includeRanges: []}}, out('10.96.0.10:53'), 'dns');
test('A10, without DNS', row, SIDECAR, out('10.96.0.10:53'), 'outbound');
test('A11', row, sidecarWith({includeRanges: [loopback]}), out('127.0.0.1:80'), 'pass');
test('A12', row, sidecarWith({excludeRanges: [tenEight]}), out('10.255.255.255:80'), 'pass');
test('A12, outside', row, sidecarWith({excludeRanges: [tenEight]}), out('11.0.0.0:80'), 'outbound');
test('A12, before A13', row, sidecarWith({excludeRanges: [tenEight], includePorts: [80]}), out('10.0.0.0:80'), 'pass');
test('A12, an exclusion around what is included', row, sidecarWith({excludeRanges: [tenEight], includeRanges: [{address: '10.96.0.0', bits: 12}]}), out('10.96.0.1:80'), 'pass');
test('A12, everything of IPv6 is nothing of IPv4', row, sidecarWith({excludeRanges: [{address: '', bits: 0}]}), out('10.96.0.1:80'), 'outbound');
test('A13', row, sidecarWith({includePorts: [80], includeRanges: []}), out('192.0.2.1:80'), 'outbound');
test('A13, udp', row, sidecarWith({includePorts: [80], includeRanges: []}), out('192.0.2.1:80', udp), 'pass');
test('A14', row, SIDECAR, out('192.0.2.1:80'), 'outbound');
test('A14, a range', row, sidecarWith({includeRanges: [tenEight]}), out('10.0.0.0:80'), 'outbound');
test('A14, udp', row, SIDECAR, out('192.0.2.1:80', udp), 'pass');
test('A14, everything of IPv6 is nothing of IPv4', row, sidecarWith({includeRanges: [{address: '', bits: 0}]}), out('10.96.0.1:80'), 'pass');
test('A15', row, sidecarWith({includeRanges: [tenEight]}), out('11.0.0.0:80'), 'pass');
test('A15, no range', row, sidecarWith({includeRanges: []}), out('10.0.0.0:80'), 'pass');
test('arriving', row, SIDECAR, arriving('10.44.0.2:80'), 'inbound');
test('arriving from the node', row, SIDECAR, arriving('10.44.0.2:80', node), 'inbound');
test('arriving by an excluded interface', row, SIDECAR, arriving('10.44.0.2:80', {interfaceExcluded: true}), 'pass');
for (const port of [15_008, 15_020, 15_021, 15_090, 8081]) {
	test('arriving, excluded', row, SIDECAR, arriving(`10.44.0.2:${port}`), 'pass');
}

test('arriving, what is the sidecar\'s own need not be listed', row, {...SIDECAR, inbound: {...SIDECAR.inbound!, excludePorts: []}}, arriving('10.44.0.2:15090'), 'pass');
test('arriving, listed', row, sidecarPorts(80, 15_020), arriving('10.44.0.2:15020'), 'inbound');
test('arriving, not listed', row, sidecarPorts(80), arriving('10.44.0.2:81'), 'pass');
test('arriving, the tunnel is listed', row, sidecarPorts(15_008), arriving('10.44.0.2:15008'), 'pass');
test('arriving, udp', row, SIDECAR, arriving('10.44.0.2:80', udp), 'pass');

test('a proxy', row, PROXY, out('10.96.0.1:53'), 'outbound');
test('a proxy, udp', row, PROXY, out('10.96.0.1:53', udp), 'pass');
test('a proxy, lo', row, PROXY, out('10.44.0.2:80'), 'pass');
test('a proxy, the mark', row, PROXY, out('10.96.0.1:80', {mark: 0x107}), 'pass');
test('a proxy, the user', row, PROXY, out('10.96.0.1:80', {uid: 1}), 'pass');
test('a proxy, the group', row, PROXY, out('10.96.0.1:80', {gid: 2}), 'pass');
test('a proxy, broadcast', row, PROXY, out('255.255.255.255:80'), 'pass');
test('a proxy, arriving', row, PROXY, arriving('10.44.0.2:80'), 'pass');

test('a prefix that is routed to the pod is lo', t => {
	const facts = {...FACTS, localPrefixes: [{address: '10.70.0.0', bits: 24}]};
	t.is(readContract(SIDECAR, facts, out('10.70.0.255:80')), 'pass');
	t.is(readContract(SIDECAR, facts, out('10.70.1.0:80')), 'outbound');
});

test('the same seed draws the same', t => {
	const draw = (seed: number) => {
		const random = randomOf(seed);
		return Array.from({length: 50}, () => {
			const capture = drawCapture(random);
			return {capture, flow: drawFlow(random, capture)};
		});
	};

	t.deepEqual(draw(7), draw(7));
	t.notDeepEqual(draw(7), draw(8));
});

test('what is drawn is well-formed, and reaches every outcome of every mode and every row that an outcome depends on', t => {
	const random = randomOf(1);
	const outcomes = new Map<string, number>();
	const decisive = {excludeRanges: 0, includeRanges: 0, excludePorts: 0, includePorts: 0, uid: 0, gid: 0, mark: 0, source: 0, dns: 0, fromNode: 0, interfaceExcluded: 0};
	for (let round = 0; round < 20_000; round++) {
		const capture = drawCapture(random);
		const flow = drawFlow(random, capture);
		const outcome = readContract(capture, FACTS, flow);
		const key = `${capture.mode} ${flow.direction} ${flow.protocol} ${outcome}`;
		outcomes.set(key, (outcomes.get(key) ?? 0) + 1);

		const {outbound, dns: _, ...rest} = capture;
		const ranges = [...outbound.excludeRanges, ...outbound.includeRanges === '*' ? [] : outbound.includeRanges];
		t.deepEqual(ranges.filter(range => !isWellFormed(range)), []);
		const ports = [...outbound.excludePorts, ...outbound.includePorts, flow.destination.port];
		t.deepEqual(ports.filter(port => !Number.isInteger(port) || port < 1 || port > 65_535), []);

		const changed: Record<keyof typeof decisive, [Capture, Flow]> = {
			excludeRanges: [{...capture, outbound: {...outbound, excludeRanges: outbound.excludeRanges.slice(1)}}, flow],
			includeRanges: [{...capture, outbound: {...outbound, includeRanges: outbound.includeRanges.slice(1) as readonly Cidr[] | '*'}}, flow],
			excludePorts: [{...capture, outbound: {...outbound, excludePorts: outbound.excludePorts.slice(1)}}, flow],
			includePorts: [{...capture, outbound: {...outbound, includePorts: outbound.includePorts.slice(1)}}, flow],
			uid: [capture, {...flow, uid: 4711}],
			gid: [capture, {...flow, gid: 4711}],
			mark: [capture, {...flow, mark: 0}],
			source: [capture, {...flow, source: {address: '', isBound: false}}],
			dns: [{...rest, outbound}, flow],
			fromNode: [capture, {...flow, fromNode: false}],
			interfaceExcluded: [capture, {...flow, interfaceExcluded: false}],
		};
		if (outbound.includeRanges === '*') {
			changed.includeRanges = [{...capture, outbound: {...outbound, includeRanges: []}}, flow];
		}

		for (const [name, [otherCapture, otherFlow]] of Object.entries(changed) as Array<[keyof typeof decisive, [Capture, Flow]]>) {
			decisive[name] += readContract(otherCapture, FACTS, otherFlow) === outcome ? 0 : 1;
		}
	}

	t.deepEqual([...outcomes.keys()].sort(), [
		'ambient in tcp inbound', 'ambient in tcp pass', 'ambient in udp pass',
		'ambient out tcp dns', 'ambient out tcp outbound', 'ambient out tcp pass', 'ambient out udp dns', 'ambient out udp pass',
		'proxy in tcp pass', 'proxy in udp pass', 'proxy out tcp outbound', 'proxy out tcp pass', 'proxy out udp pass',
		'sidecar in tcp inbound', 'sidecar in tcp pass', 'sidecar in udp pass',
		'sidecar out tcp dns', 'sidecar out tcp inbound', 'sidecar out tcp outbound', 'sidecar out tcp pass', 'sidecar out udp dns', 'sidecar out udp pass',
	]);
	for (const [name, count] of [...outcomes, ...Object.entries(decisive)]) {
		t.true(count >= 10, `${name} in ${count} of 20,000`);
	}
});

/** Canonical, without host bits. */
function isWellFormed({address, bits}: Cidr): boolean {
	const isV6 = address === '' || address.includes(':');
	const bytes = isV6 ? addressToBytes(address) : addressToBytes(address).subarray(12);
	const binary = [...bytes].map(byte => byte.toString(2).padStart(8, '0')).join('');
	return address === canonicalAddress(address) && bits >= 0 && bits <= binary.length && !binary.slice(bits).includes('1');
}
