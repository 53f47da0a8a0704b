/**
CAPTURE.md read row by row: what has to become of a flow. An oracle for generator tests, so it shares no code with src/ but types and the parsing of
addresses. Also draws captures and flows that lie at the edges of the rows.
*/
import {addressFromBytes, addressToBytes, canonicalAddress} from '../../src/maps/address.js';
import type {Capture, Cidr} from '../../src/redirect/capture.js';

/** A connection, or a datagram of an unconnected socket, as its maker asks for it. */
export interface Flow {
	/** `out` is made in the pod, `in` comes from outside of it. */
	readonly direction: 'out' | 'in';
	readonly protocol: 'tcp' | 'udp';
	readonly destination: {readonly address: string; readonly port: number};
	/** `out`: the address counts only if the socket is bound to it. */
	readonly source: {readonly address: string; readonly isBound: boolean};
	readonly mark: number;
	readonly uid: number;
	readonly gid: number;
	/** `in`: made by a process in the node's own network namespace. */
	readonly fromNode: boolean;
	/** The interface that it leaves or arrives by is one of `excludeInterfaces`. */
	readonly interfaceExcluded: boolean;
}

/** To the port for outbound (15001), inbound (15006) or DNS (15053), or on to where it was going. */
export type Outcome = 'outbound' | 'inbound' | 'dns' | 'pass';

export interface ContractFacts {
	readonly ownAddresses: readonly string[];
	/** What else is routed to the pod itself. */
	readonly localPrefixes?: readonly Cidr[];
}

/** Whom {@link drawFlow} draws for. */
export const FACTS: ContractFacts = {ownAddresses: ['10.44.0.2', 'fd44::2']};

export function readContract(capture: Capture, facts: ContractFacts, flow: Flow): Outcome {
	if (flow.direction === 'in') {
		return readInbound(capture, flow);
	}

	const seen = asRulesSeeIt(capture, facts, flow);
	if (seen.tcp && isGroup(seen.dst)) {
		return 'pass'; // The stack refuses it (RFC 9293, 3.9.2.3): no rule ever sees it. UDP to groups, rules do see.
	}

	switch (capture.mode) {
		case 'ambient': {
			return readAmbient(capture, seen);
		}

		case 'sidecar': {
			return readSidecar(capture, seen);
		}

		case 'proxy': {
			return readProxy(capture, seen);
		}
	}
}

/** CAPTURE.md 1 and 2, arriving from outside the pod. */
function readInbound({mode, inbound, exempt}: Capture, flow: Flow): Outcome {
	const dst = canonicalAddress(flow.destination.address);
	const dport = flow.destination.port;
	if (!inbound) return 'pass'; // bypass-inbound-capture; includeInboundPorts is empty; mode proxy
	if (flow.protocol !== 'tcp') return 'pass';
	if (flow.interfaceExcluded) return 'pass'; // 2: excludeInterfaces
	if (dport === 15_008) return 'pass'; // 1 and 2: 15008
	if (mode === 'ambient') {
		if (flow.fromNode && inbound.passNode) return 'pass'; // P1
		if (!isLO(dst) && !hasMark(exempt.marks, flow.mark)) return 'inbound'; // P2
		return 'pass';
	}

	if (inbound.includePorts !== '*') return inbound.includePorts.includes(dport) ? 'inbound' : 'pass'; // 2: a list
	if ([15_020, 15_021, 15_090].includes(dport)) return 'pass'; // 2: `*`
	if (inbound.excludePorts.includes(dport)) return 'pass'; // 2: `*`
	return 'inbound'; // 2: `*`
}

/** CAPTURE.md 1. */
function readAmbient({dns, exempt}: Capture, {tcp, udp, dst, dport, lo, mark}: Seen): Outcome {
	// Also 0x111, which here stands for 0x539 on sockets that bind the client's address: in Istio's rules it spares a flow O6, and not O2 and O3.
	const MARK = hasMark(exempt.marks, mark);
	if (dns && udp && dport === 53 && !lo && !MARK) return 'dns'; // O2
	if (dns && tcp && dport === 53 && !isLO(dst) && !MARK) return 'dns'; // O3
	if (lo && !isLO(dst)) return 'pass'; // O5
	if (tcp && !isLO(dst) && !MARK) return 'outbound'; // O6
	return 'pass'; // Other UDP, and LO
}

/** CAPTURE.md 2. */
function readSidecar({dns, outbound, proxy}: Capture, {tcp, udp, dst, dport, src, lo, uid, gid, interfaceExcluded}: Seen): Outcome {
	const {excludePorts, includePorts, excludeRanges, includeRanges} = outbound;
	const loopbackIncluded = includeRanges !== '*' && includeRanges.some(({address}) => isLoopback(address));
	const isUid = uid === proxy!.uid;
	const isGid = gid === proxy!.gid;

	if (interfaceExcluded) return 'pass'; // A0
	if (excludePorts.includes(dport)) return 'pass'; // A1, tcp and udp
	if (lo && (src === '127.0.0.6' || src === '::6')) return 'pass'; // A2

	if (isUid && lo && !isLO(dst) && tcp && dport !== 15_008 && !(dns && dport === 53)) return 'inbound'; // A3
	if (!isUid && lo && !loopbackIncluded && (!dns || (tcp && dport !== 53))) return 'pass'; // A4
	if (isUid) return 'pass'; // A5

	if (isGid && lo && !isLO(dst) && tcp && dport !== 15_008) return 'inbound'; // A6, with DNS too
	if (!isGid && lo && !loopbackIncluded && (!dns || (tcp && dport !== 53))) return 'pass'; // A7; decides nothing, as A4 has had the same flows
	if (isGid) return 'pass'; // A8

	if (dns && (tcp || udp) && dport === 53) return 'dns'; // A10
	if (isLO(dst)) return 'pass'; // A11
	if (excludeRanges.some(range => contains(range, dst))) return 'pass'; // A12
	if (tcp && includePorts.includes(dport)) return 'outbound'; // A13
	if (tcp && (includeRanges === '*' || includeRanges.some(range => contains(range, dst)))) return 'outbound'; // A14; REDIRECT is for tcp only
	return 'pass'; // A15
}

/** CAPTURE.md 3. */
function readProxy({exempt}: Capture, {tcp, lo, mark, uid, gid}: Seen): Outcome {
	if (hasMark(exempt.marks, mark)) return 'pass';
	if (exempt.uids.includes(uid)) return 'pass';
	if (exempt.gids.includes(gid)) return 'pass';
	if (lo) return 'pass';
	if (tcp) return 'outbound';
	return 'pass';
}

/** An outbound flow after the kernel has chosen what its maker left open, which is when iptables rules see it. */
interface Seen {
	readonly tcp: boolean;
	readonly udp: boolean;
	readonly dst: string;
	readonly dport: number;
	readonly src: string;
	/** Routed to an address of the pod. */
	readonly lo: boolean;
	readonly mark: number;
	readonly uid: number;
	readonly gid: number;
	readonly interfaceExcluded: boolean;
}

function asRulesSeeIt({mode}: Capture, {ownAddresses, localPrefixes = []}: ContractFacts, flow: Flow): Seen {
	const {protocol, source, destination, mark, uid, gid, interfaceExcluded} = flow;
	const asked = canonicalAddress(destination.address);
	const bound = source.isBound && !isUnspecified(canonicalAddress(source.address)) ? canonicalAddress(source.address) : undefined;
	let dst = asked;
	if (isUnspecified(asked)) {
		dst = isV6(asked) ? '::1' : bound ?? '127.0.0.1';
	}

	const lo = isLoopback(dst)
		|| ownAddresses.some(own => canonicalAddress(own) === dst)
		|| localPrefixes.some(prefix => contains(prefix, dst))
		// The agent adds it to lo, as Istio does.
		|| (mode === 'sidecar' && dst === '::6');
	return {
		tcp: protocol === 'tcp',
		udp: protocol === 'udp',
		dst,
		dport: destination.port,
		// Measured with `ip route get`: 127.0.0.6 is reached from 127.0.0.1, and ::6 from ::6. Off lo the address says nothing to any row.
		src: bound ?? (dst.startsWith('127.') ? '127.0.0.1' : dst),
		lo,
		mark,
		uid,
		gid,
		interfaceExcluded,
	};
}

// An all-zero IPv6 address is ''.
const isV6 = (address: string) => address === '' || address.includes(':');
const isUnspecified = (address: string) => address === '' || address === '0.0.0.0';
/** CAPTURE.md's LO: these two addresses, not all of 127/8. */
const isLO = (address: string) => address === '127.0.0.1' || address === '::1';
const isLoopback = (address: string) => address === '::1' || address.startsWith('127.');
const isGroup = (address: string) => address === '255.255.255.255' || address === '127.255.255.255' || contains({address: '224.0.0.0', bits: 4}, address) || contains({address: 'ff00::', bits: 8}, address);
const hasMark = (marks: Capture['exempt']['marks'], mark: number) => marks.some(({value, mask}) => ((mark & mask) >>> 0) === value);

function contains({address, bits}: Cidr, candidate: string): boolean {
	const hostBits = BigInt(widthOf(address) - bits);
	return isV6(address) === isV6(candidate) && toNumber(address) >> hostBits === toNumber(candidate) >> hostBits;
}

const widthOf = (address: string) => isV6(address) ? 128 : 32;

function toNumber(address: string): bigint {
	const value = BigInt(`0x${Buffer.from(addressToBytes(address)).toString('hex')}`);
	return isV6(address) ? value : value & 0xff_ff_ff_ffn;
}

function toAddress(value: bigint, width: number): string {
	return addressFromBytes(Buffer.from(BigInt.asUintN(width, value).toString(16).padStart(width / 4, '0'), 'hex'));
}

/** Numbers from 0 to below 1. */
export type Random = () => number;

/** The same numbers for the same seed: mulberry32. */
export function randomOf(seed: number): Random {
	let state = seed | 0;
	return () => {
		state = (state + 0x6d_2b_79_f5) | 0;
		let mixed = Math.imul(state ^ (state >>> 15), state | 1);
		mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)) ^ mixed;
		return ((mixed ^ (mixed >>> 14)) >>> 0) / 0x1_00_00_00_00;
	};
}

const PROXY_UID = 1337;
const PROXY_GID = 1338;
const ZTUNNEL_MARKS = [{value: 0x539, mask: 0xfff}, {value: 0x111, mask: 0xfff}];
const OUTBOUND_ONLY = {port: 15_001, excludePorts: [], includePorts: [], excludeRanges: [], includeRanges: '*'} as const;

/** Ranges that lie inside, around and beside each other. */
const RANGES: readonly Cidr[] = [
	{address: '0.0.0.0', bits: 0}, {address: '10.0.0.0', bits: 8}, {address: '10.96.0.0', bits: 12}, {address: '10.96.5.0', bits: 24}, {address: '10.96.5.0', bits: 25},
	{address: '10.96.5.128', bits: 25}, {address: '10.96.5.7', bits: 32}, {address: '10.44.0.0', bits: 16}, {address: '10.44.0.2', bits: 32}, {address: '128.0.0.0', bits: 1},
	{address: '', bits: 0}, {address: 'fd00::', bits: 8}, {address: 'fd96::', bits: 16}, {address: 'fd96:5::', bits: 32}, {address: 'fd96:5::', bits: 127},
	{address: 'fd96:5::7', bits: 128}, {address: 'fd44::', bits: 64}, {address: 'fd44::2', bits: 128}, {address: '8000::', bits: 1},
];
const LOOPBACK_RANGES: readonly Cidr[] = [{address: '127.0.0.0', bits: 8}, {address: '127.0.0.1', bits: 32}, {address: '127.0.0.6', bits: 32}, {address: '::1', bits: 128}];
const ADDRESSES = ['10.96.5.7', '10.96.5.128', '10.44.0.3', '192.0.2.9', '127.0.0.1', '127.0.0.2', '127.0.0.6', '0.0.0.0', 'fd96:5::7', 'fd44::3', '2001:db8::9', '::1', '::6', ''];
const GROUPS = ['224.0.0.251', '239.255.255.255', '255.255.255.255', 'ff02::fb'];
const PORTS = [1, 52, 53, 54, 80, 443, 8080, 15_001, 15_006, 15_007, 15_008, 15_009, 15_020, 15_021, 15_053, 15_090, 65_535];

const chance = (random: Random, probability: number) => random() < probability;
const below = (random: Random, limit: number) => Math.floor(random() * limit);
const pick = <T>(random: Random, values: readonly T[]): T => values[below(random, values.length)]!;
const someOf = <T>(random: Random, most: number, draw: () => T): readonly T[] => Array.from({length: below(random, most + 1)}, draw);
const drawPort = (random: Random) => chance(random, 0.8) ? pick(random, PORTS) : 1 + below(random, 65_535);

/** A capture that annotations, or the pods file for mode proxy, can give. */
export function drawCapture(random: Random): Capture {
	const mode = pick(random, ['sidecar', 'sidecar', 'sidecar', 'ambient', 'proxy'] as const);
	const nothing = {marks: [], uids: [], gids: [], cgroups: []};
	if (mode === 'proxy') {
		const exempt = {
			...nothing,
			...pick(random, [{marks: [{value: 0x539, mask: 0xfff}]}, {uids: [PROXY_UID]}, {gids: [PROXY_GID]}, {marks: [{value: 7, mask: 0xff_ff_ff_ff}], uids: [PROXY_UID, 0], gids: [PROXY_GID]}]),
		};
		return {mode, exempt, outbound: OUTBOUND_ONLY, keepSource: false, excludeInterfaces: []};
	}

	const dns = chance(random, 0.5) ? {dns: {port: 15_053}} : {};
	if (mode === 'ambient') {
		return {
			mode,
			exempt: {...nothing, marks: ZTUNNEL_MARKS},
			outbound: OUTBOUND_ONLY,
			...(chance(random, 0.8) ? {inbound: {port: 15_006, includePorts: '*', excludePorts: [15_008], passNode: true}} : {}),
			...dns,
			keepSource: true,
			excludeInterfaces: [],
		};
	}

	return {
		mode,
		exempt: nothing,
		outbound: {
			port: 15_001,
			excludePorts: drawPorts(random),
			includePorts: drawPorts(random),
			excludeRanges: drawRanges(random),
			includeRanges: chance(random, 0.4) ? '*' : [...drawRanges(random), ...(chance(random, 0.2) ? [pick(random, LOOPBACK_RANGES)] : [])],
		},
		...drawInbound(random),
		...dns,
		keepSource: false,
		excludeInterfaces: chance(random, 0.2) ? ['net1'] : [],
		proxy: {uid: PROXY_UID, gid: PROXY_GID},
	};
}

/** Of a list that somebody's program wrote. */
const LONG = 1000;

function drawPorts(random: Random): readonly number[] {
	if (chance(random, 0.02)) {
		return Array.from({length: LONG}, (_, index) => (2 * index) + 1);
	}

	return chance(random, 0.4) ? [] : [...new Set(someOf(random, 4, () => drawPort(random)))];
}

function drawRanges(random: Random): readonly Cidr[] {
	if (chance(random, 0.02)) {
		return Array.from({length: LONG}, (_, index) => ({address: `10.${96 + (index >> 7)}.${(2 * index) & 0xff}.0`, bits: 24}));
	}

	const ranges = someOf(random, 4, () => chance(random, 0.8) ? pick(random, RANGES) : drawRange(random));
	return [...new Map(ranges.map(range => [`${range.address}/${range.bits}`, range])).values()];
}

/** Any length, around an address that flows go to; not loopback, which has a meaning of its own. */
function drawRange(random: Random): Cidr {
	const address = pick(random, ADDRESSES.filter(candidate => !isLoopback(candidate)));
	const width = widthOf(address);
	const bits = below(random, width + 1);
	const hostBits = BigInt(width - bits);
	return {address: toAddress((toNumber(address) >> hostBits) << hostBits, width), bits};
}

function drawInbound(random: Random): Pick<Capture, 'inbound'> {
	const passNode = false;
	if (chance(random, 0.6)) {
		return {inbound: {port: 15_006, includePorts: '*', excludePorts: [...new Set([15_008, 15_020, 15_021, 15_090, ...drawPorts(random)])], passNode}};
	}

	const includePorts = drawPorts(random);
	return includePorts.length > 0 ? {inbound: {port: 15_006, includePorts, excludePorts: [15_008], passNode}} : {};
}

/** A flow at or near the edges of `capture`, for a pod with these facts. Loopback sources are drawn only where the kernel would send them: over lo. */
export function drawFlow(random: Random, capture: Capture, {ownAddresses}: ContractFacts = FACTS): Flow {
	const {outbound, inbound, dns, exempt, proxy, excludeInterfaces} = capture;
	const inPorts = [...inbound?.excludePorts ?? [], ...inbound && inbound.includePorts !== '*' ? inbound.includePorts : []];
	const listedPorts = [...outbound.excludePorts, ...outbound.includePorts, ...inPorts];
	const favoured = [...listedPorts, ...dns ? [53, 53] : []];
	const port = favoured.length > 0 && chance(random, 0.5) ? pick(random, favoured) : drawPort(random);
	const nothing = {mark: 0, uid: 0, gid: 0, fromNode: false};
	if (chance(random, 0.25)) {
		const address = pick(random, ownAddresses);
		return {
			...nothing,
			direction: 'in',
			protocol: chance(random, 0.9) ? 'tcp' : 'udp',
			destination: {address, port},
			source: {address: isV6(address) ? 'fd44::9' : '10.44.0.9', isBound: true},
			fromNode: chance(random, 0.3),
			interfaceExcluded: excludeInterfaces.length > 0 && chance(random, 0.3),
		};
	}

	const address = drawDestination(random, capture, ownAddresses);
	const isLocal = isLoopback(address) || isUnspecified(address) || ownAddresses.includes(address) || (capture.mode === 'sidecar' && address === '::6');
	const sources = [...ownAddresses, ...isLocal ? ['127.0.0.1', '127.0.0.6', '::1', ...capture.mode === 'sidecar' ? ['::6'] : []] : []].filter(source => isV6(source) === isV6(address));
	const isBound = sources.length > 0 && chance(random, 0.4);
	return {
		...nothing,
		direction: 'out',
		protocol: chance(random, 0.7) ? 'tcp' : 'udp',
		destination: {address, port},
		source: {address: isBound ? pick(random, sources) : isV6(address) ? '' : '0.0.0.0', isBound},
		mark: drawMark(random, exempt.marks),
		uid: pick(random, [0, 1000, PROXY_UID, proxy?.uid ?? PROXY_UID]),
		gid: pick(random, [0, 1000, PROXY_GID, PROXY_UID]),
		// What goes over lo leaves by lo, which is not among the interfaces that are drawn.
		interfaceExcluded: excludeInterfaces.length > 0 && !isLocal && chance(random, 0.3),
	};
}

function drawDestination(random: Random, {outbound}: Capture, ownAddresses: readonly string[]): string {
	const ranges = [...outbound.excludeRanges, ...outbound.includeRanges === '*' ? [] : outbound.includeRanges].filter(({address}) => !isLoopback(address));
	if (ranges.length > 0 && chance(random, 0.4)) {
		return edgeOf(random, pick(random, ranges));
	}

	if (chance(random, 0.25)) {
		return pick(random, ownAddresses);
	}

	return chance(random, 0.04) ? pick(random, GROUPS) : pick(random, ADDRESSES);
}

/** First, last, or beside either; around the address space's ends it wraps. */
function edgeOf(random: Random, {address, bits}: Cidr): string {
	const width = widthOf(address);
	const first = toNumber(address);
	const last = first + (1n << BigInt(width - bits)) - 1n;
	return toAddress(pick(random, [first, last, first - 1n, last + 1n, first + (last - first) / 3n]), width);
}

function drawMark(random: Random, marks: Capture['exempt']['marks']): number {
	if (marks.length === 0 || chance(random, 0.5)) {
		return pick(random, [0, 0, 0x539]);
	}

	const {value, mask} = pick(random, marks);
	// Bits outside the mask do not count; one inside does.
	return pick(random, [value, (value | (0x1000 & ~mask)) >>> 0, (value ^ 1) >>> 0]);
}
