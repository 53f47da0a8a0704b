/**
What the kernel's maps should hold for one pod. Pure: no I/O, no clock.
*/
import {PodError} from '../errors.js';
import {NO_ADDRESS} from '../maps/address.js';
import {
	MARKS_MAX, POD_ACCELERATE, POD_ACCELERATE_ALWAYS, POD_EXEMPT_GIDS, POD_EXEMPT_INTERFACES, POD_EXEMPT_UIDS, POD_INBOUND, POD_INBOUND_ALL, POD_INCLUDE_ALL, POD_INCLUDE_LOOPBACK, POD_KEEP_SOURCE, POD_PASS_NODE,
	POD_PORTS, POD_SIDECAR, PORT_INBOUND_EXCLUDED, PORT_INBOUND_INCLUDED, PORT_OUTBOUND_EXCLUDED, PORT_OUTBOUND_INCLUDED, PREFIX_EXCLUDED, PREFIX_INCLUDED, PREFIX_INTERFACE,
	PREFIX_LOCAL, PREFIX_LOCALHOST, PREFIX_NOT_UNICAST, type AddressKey, type ExemptionKey, type NetnsCookie, type PodInfo, type PodValue, type PortKey, type PortValue, type Target,
} from '../maps/schema.js';
import type {Capture, Cidr} from './capture.js';
import {flatten, isIpv6, isLoopback, type Prefix, type Range} from './prefixes.js';

export interface Route extends Cidr {
	readonly interfaceIndex: number;
}

/** What is known of a pod's namespace, read a moment ago. */
export interface PodFacts {
	readonly cookie: NetnsCookie;
	readonly device: bigint;
	readonly inode: bigint;
	/** Global addresses on interfaces other than lo that are up, in the kernel's order. */
	readonly addresses: readonly string[];
	/** The namespace's table `local`. */
	readonly localRoutes: ReadonlyArray<Cidr & {readonly isUnicast: boolean}>;
	/** Its other tables. */
	readonly routes: readonly Route[];
	readonly interfaces: ReadonlyArray<{readonly index: number; readonly name: string}>;
	/** The pod's exempt cgroups, with their depth below the hierarchy's root. */
	readonly cgroups: ReadonlyArray<{readonly id: bigint; readonly level: number}>;
}

/** A pod's entries. Lists go under a policy id, which is given out when they are written. */
export interface PodPolicy {
	readonly cookie: NetnsCookie;
	readonly pod: Omit<PodValue, 'policy'>;
	readonly info: Omit<PodInfo, 'enrolledAtMs' | 'namespaceChanges'>;
	readonly prefixes: readonly Prefix[];
	readonly ports: ReadonlyArray<Omit<PortKey, 'policy'> & PortValue>;
	readonly exemptions: ReadonlyArray<Omit<ExemptionKey, 'policy'>>;
	/** By which a packet or a connection is known to be for this pod. */
	readonly addresses: readonly AddressKey[];
}

/** A pod as it was asked for. */
export interface PodRequest {
	readonly name: string;
	/** Checked against the namespace's, and the only ones used as the pod's own; all of the namespace's when left out. */
	readonly ips?: readonly string[];
	readonly capture: Capture;
}

/** What is true in every pod; TCP to groups is refused by the stack (RFC 9293, 3.9.2.3), and would not be if it were sent to the proxy. */
const ALWAYS: readonly Range[] = [
	{address: '127.0.0.0', bits: 8, flags: PREFIX_LOCAL},
	{address: '127.0.0.1', bits: 32, flags: PREFIX_LOCAL | PREFIX_LOCALHOST},
	{address: '::1', bits: 128, flags: PREFIX_LOCAL | PREFIX_LOCALHOST},
	{address: '224.0.0.0', bits: 4, flags: PREFIX_NOT_UNICAST},
	{address: '255.255.255.255', bits: 32, flags: PREFIX_NOT_UNICAST},
	{address: 'ff00::', bits: 8, flags: PREFIX_NOT_UNICAST},
];

/** Where a sidecar's proxy takes connections from its own pod, captured inbound or not (CAPTURE.md, A3). */
const SIDECAR_INBOUND_PORT = 15_006;

/** A sidecar's proxy binds it towards the application; put on lo by the agent. */
export const PASSTHROUGH_ADDRESS = '::6';

/** @throws PodError when what the user wrote does not fit the namespace. */
export function compilePolicy({name, ips, capture}: PodRequest, facts: PodFacts): PodPolicy {
	for (const ip of ips ?? []) {
		if (!facts.addresses.includes(ip)) {
			throw new PodError(name, `its namespace does not have the address ${ip} (it has ${facts.addresses.join(', ') || 'none'}): correct ips, or leave it out`);
		}
	}

	const own = ips ?? facts.addresses;
	const address4 = own.find(address => !isIpv6(address)) ?? NO_ADDRESS;
	const address6 = own.find(address => isIpv6(address)) ?? NO_ADDRESS;
	if (address4 === NO_ADDRESS && address6 === NO_ADDRESS) {
		throw new PodError(name, 'its namespace has no global address yet: wait for the network to be set up');
	}

	const target4 = targetOf(capture, facts, address4, false);
	const target6 = targetOf(capture, facts, address6, true);
	const {marks, uids, gids} = capture.exempt;
	if (capture.mode === 'proxy' && (target4.inPod || target6.inPod) && marks.length + uids.length + gids.length + facts.cgroups.length === 0) {
		throw new PodError(name, 'its proxy is inside the pod and nothing is exempt, so the proxy\'s own connections would come back to it: give exempt.marks, uids, gids or cgroups');
	}

	const excluded = new Set(facts.interfaces.filter(({name}) => capture.excludeInterfaces.includes(name)).map(({index}) => index));
	const ports = portsOf(capture);
	return {
		cookie: facts.cookie,
		pod: {
			flags: flagsOf(capture, excluded.size > 0, ports.length > 0),
			exemptCgroupLevels: facts.cgroups.reduce((levels, {level}) => (levels | (1 << level)) >>> 0, 0),
			markCount: marks.length,
			marks: Array.from({length: MARKS_MAX}, (_, index) => marks[index] ?? {value: 0, mask: 0}),
			proxyUid: capture.proxy?.uid ?? 0,
			proxyGid: capture.proxy?.gid ?? 0,
			inboundPort: capture.inbound?.port ?? (capture.mode === 'sidecar' ? SIDECAR_INBOUND_PORT : 0),
			dnsPort: capture.dns?.port ?? 0,
			target4,
			target6,
		},
		info: {name, mode: capture.mode, address4, address6, netnsDevice: facts.device, netnsInode: facts.inode},
		prefixes: prefixesOf(capture, facts, excluded),
		ports,
		exemptions: [
			...unique(uids).map(id => ({kind: 'EXEMPT_UID' as const, id: BigInt(id)})),
			...unique(gids).map(id => ({kind: 'EXEMPT_GID' as const, id: BigInt(id)})),
			...unique(facts.cgroups.map(({id}) => id)).map(id => ({kind: 'EXEMPT_CGROUP' as const, id})),
			...[...excluded].map(index => ({kind: 'EXEMPT_INTERFACE' as const, id: BigInt(index)})),
		],
		addresses: facts.localRoutes
			.filter(({address, isUnicast}) => isUnicast && !isLoopback(address) && address !== PASSTHROUGH_ADDRESS && !isLinkLocal(address))
			.map(({address, bits}) => ({address, bits: isIpv6(address) ? bits : 96 + bits})),
	};
}

function flagsOf(capture: Capture, hasInterfaces: boolean, hasPorts: boolean): number {
	const {mode, exempt, outbound, inbound, keepSource} = capture;
	const {includeRanges} = outbound;
	const includesLoopback = includeRanges !== '*' && includeRanges.some(({address, bits}) => isLoopback(address) && bits > 0);
	const flags: ReadonlyArray<readonly [boolean, number]> = [
		[mode === 'sidecar', POD_SIDECAR],
		[exempt.uids.length > 0, POD_EXEMPT_UIDS],
		[exempt.gids.length > 0, POD_EXEMPT_GIDS],
		[hasInterfaces, POD_EXEMPT_INTERFACES],
		[hasPorts, POD_PORTS],
		[includeRanges === '*', POD_INCLUDE_ALL],
		[includesLoopback, POD_INCLUDE_LOOPBACK],
		[inbound !== undefined, POD_INBOUND],
		[inbound?.includePorts === '*', POD_INBOUND_ALL],
		[inbound?.passNode === true, POD_PASS_NODE],
		[keepSource, POD_KEEP_SOURCE],
		[capture.acceleration !== 'off', POD_ACCELERATE],
		[capture.acceleration === 'on', POD_ACCELERATE_ALWAYS],
	];
	return flags.reduce((all, [holds, flag]) => holds ? all | flag : all, 0);
}

function targetOf({outbound}: Capture, facts: PodFacts, own: string, v6: boolean): Target {
	const address = outbound.addresses ? outbound.addresses.find(address => isIpv6(address) === v6) ?? NO_ADDRESS : own;
	// From a pod without an address of this family nothing can come that the proxy could be shown.
	if (address === NO_ADDRESS || own === NO_ADDRESS) {
		return {address: NO_ADDRESS, source: NO_ADDRESS, port: 0, inPod: 0, spread: 0};
	}

	return {
		address,
		source: own,
		port: outbound.port,
		inPod: isLoopback(address) || facts.addresses.includes(address) ? 1 : 0,
		spread: outbound.addresses === undefined && !v6 ? 1 : 0,
	};
}

function prefixesOf({mode, outbound}: Capture, facts: PodFacts, excluded: ReadonlySet<number>): readonly Prefix[] {
	// ::6 is there for sidecars: put on lo after the facts were read, or still to be taken away.
	const local = facts.localRoutes.filter(({address}) => address !== PASSTHROUGH_ADDRESS).map(({address, bits, isUnicast}): Range => ({address, bits, flags: isUnicast ? PREFIX_LOCAL : PREFIX_NOT_UNICAST, route: 0}));
	const routes = excluded.size > 0 ? facts.routes.map(({address, bits, interfaceIndex}): Range => ({address, bits, route: excluded.has(interfaceIndex) ? PREFIX_INTERFACE : 0})) : [];
	return flatten([
		...ALWAYS,
		...(mode === 'sidecar' ? [{address: PASSTHROUGH_ADDRESS, bits: 128, flags: PREFIX_LOCAL}] : []),
		...routes,
		...local,
		...outbound.excludeRanges.map(range => ({...range, flags: PREFIX_EXCLUDED})),
		...(outbound.includeRanges === '*' ? [] : outbound.includeRanges.map(range => ({...range, flags: PREFIX_INCLUDED}))),
	]);
}

function portsOf({outbound, inbound}: Capture): ReadonlyArray<Omit<PortKey, 'policy'> & PortValue> {
	const lists: ReadonlyArray<readonly [readonly number[], number]> = [
		[outbound.excludePorts, PORT_OUTBOUND_EXCLUDED],
		[outbound.includePorts, PORT_OUTBOUND_INCLUDED],
		[inbound?.excludePorts ?? [], PORT_INBOUND_EXCLUDED],
		[inbound && inbound.includePorts !== '*' ? inbound.includePorts : [], PORT_INBOUND_INCLUDED],
	];
	const ports = new Map<number, number>();
	for (const [list, flag] of lists) {
		for (const port of list) {
			ports.set(port, (ports.get(port) ?? 0) | flag);
		}
	}

	return [...ports].map(([port, flags]) => ({port, flags}));
}

/** fe80::/10: the same in many pods, so it does not tell whose it is. */
function isLinkLocal(address: string): boolean {
	return /^fe[89ab]/.test(address);
}

function unique<T>(values: readonly T[]): readonly T[] {
	return [...new Set(values)];
}
