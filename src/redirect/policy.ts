/**
What the kernel's maps should hold for one pod. Pure: no I/O, no clock.
*/
import type {PodSpec} from '../config/pods-file.js';
import {PodError} from '../errors.js';
import {NO_ADDRESS} from '../maps/address.js';
import {
	MARKS_MAX, POD_EXEMPT_GIDS, POD_EXEMPT_UIDS, type ExemptionKey, type NetnsCookie, type PodInfo, type PodValue, type PrefixValue, type Target,
} from '../maps/schema.js';

/** What is known of a pod's namespace, read a moment ago. */
export interface PodFacts {
	readonly cookie: NetnsCookie;
	readonly device: bigint;
	readonly inode: bigint;
	/** Global addresses on interfaces other than lo that are up, in the kernel's order. */
	readonly addresses: readonly string[];
	/** The namespace's table `local`. */
	readonly localRoutes: ReadonlyArray<{readonly address: string; readonly prefixLength: number; readonly isUnicast: boolean}>;
	/** The pod's exempt cgroups, with their depth below the hierarchy's root. */
	readonly cgroups: ReadonlyArray<{readonly id: bigint; readonly level: number}>;
}

export interface Prefix extends PrefixValue {
	readonly address: string;
	/** 0 to 128, of the 16-byte form. */
	readonly bits: number;
}

/** A pod's entries. Lists go under a policy id, which is given out when they are written. */
export interface PodPolicy {
	readonly cookie: NetnsCookie;
	readonly pod: Omit<PodValue, 'policy'>;
	readonly info: Omit<PodInfo, 'enrolledAtMs'>;
	readonly prefixes: readonly Prefix[];
	readonly exemptions: ReadonlyArray<Omit<ExemptionKey, 'policy'>>;
}

/**
Destinations that no rule captures, in every pod: an unspecified address means loopback to connect(2); TCP to groups is refused by the stack (RFC 9293,
3.9.2.3), and would not be if it were sent to the proxy.
*/
const ALWAYS: readonly Prefix[] = [
	{address: '0.0.0.0', bits: 128, kind: 'PREFIX_LOCAL'},
	{address: '127.0.0.0', bits: 104, kind: 'PREFIX_LOCAL'},
	{address: NO_ADDRESS, bits: 128, kind: 'PREFIX_LOCAL'},
	{address: '::1', bits: 128, kind: 'PREFIX_LOCAL'},
	{address: '224.0.0.0', bits: 100, kind: 'PREFIX_NOT_UNICAST'},
	{address: '255.255.255.255', bits: 128, kind: 'PREFIX_NOT_UNICAST'},
	{address: 'ff00::', bits: 8, kind: 'PREFIX_NOT_UNICAST'},
];

const isV6 = (address: string) => address.includes(':');
const isLoopback = (address: string) => address === '::1' || address.startsWith('127.');

/** @throws PodError when what the user wrote does not fit the namespace. */
export function compilePolicy(spec: PodSpec, facts: PodFacts): PodPolicy {
	for (const ip of spec.ips ?? []) {
		if (!facts.addresses.includes(ip)) {
			throw new PodError(spec.name, `its namespace does not have the address ${ip} (it has ${facts.addresses.join(', ') || 'none'}): correct ips, or leave it out`);
		}
	}

	const own = spec.ips ?? facts.addresses;
	const address4 = own.find(address => !isV6(address)) ?? NO_ADDRESS;
	const address6 = own.find(address => isV6(address)) ?? NO_ADDRESS;
	if (address4 === NO_ADDRESS && address6 === NO_ADDRESS) {
		throw new PodError(spec.name, 'its namespace has no global address yet: wait for the network to be set up');
	}

	const target4 = targetOf(spec, facts, address4, false);
	const target6 = targetOf(spec, facts, address6, true);
	const {marks, uids, gids} = spec.exempt;
	if ((target4.inPod || target6.inPod) && marks.length + uids.length + gids.length + facts.cgroups.length === 0) {
		throw new PodError(spec.name, 'its proxy is inside the pod and nothing is exempt, so the proxy\'s own connections would come back to it: give exempt.marks, uids, gids or cgroups');
	}

	return {
		cookie: facts.cookie,
		pod: {
			flags: (uids.length > 0 ? POD_EXEMPT_UIDS : 0) | (gids.length > 0 ? POD_EXEMPT_GIDS : 0),
			exemptCgroupLevels: facts.cgroups.reduce((levels, {level}) => (levels | (1 << level)) >>> 0, 0),
			markCount: marks.length,
			marks: Array.from({length: MARKS_MAX}, (_, index) => marks[index] ?? {value: 0, mask: 0}),
			target4,
			target6,
		},
		info: {name: spec.name, mode: spec.mode, address4, address6, netnsDevice: facts.device, netnsInode: facts.inode},
		prefixes: prefixesOf(facts),
		exemptions: [
			...unique(uids).map(id => ({kind: 'EXEMPT_UID' as const, id: BigInt(id)})),
			...unique(gids).map(id => ({kind: 'EXEMPT_GID' as const, id: BigInt(id)})),
			...unique(facts.cgroups.map(({id}) => id)).map(id => ({kind: 'EXEMPT_CGROUP' as const, id})),
		],
	};
}

function targetOf({proxy}: PodSpec, facts: PodFacts, own: string, v6: boolean): Target {
	const address = proxy.addresses ? proxy.addresses.find(address => isV6(address) === v6) ?? NO_ADDRESS : own;
	const loopback = isLoopback(address);
	// From a pod without an address of this family nothing can come that the proxy could be shown.
	if (address === NO_ADDRESS || own === NO_ADDRESS) {
		return {address: NO_ADDRESS, source: NO_ADDRESS, port: 0, inPod: 0};
	}

	return {
		address,
		source: loopback ? own : NO_ADDRESS,
		port: proxy.port,
		inPod: loopback || facts.addresses.includes(address) ? 1 : 0,
	};
}

function prefixesOf(facts: PodFacts): readonly Prefix[] {
	const prefixes = new Map<string, Prefix>();
	const routes = facts.localRoutes.map(({address, prefixLength, isUnicast}): Prefix => ({
		address,
		bits: isV6(address) || address === NO_ADDRESS ? prefixLength : 96 + prefixLength,
		kind: isUnicast ? 'PREFIX_LOCAL' : 'PREFIX_NOT_UNICAST',
	}));
	for (const prefix of [...routes, ...ALWAYS]) {
		prefixes.set(`${prefix.address}/${prefix.bits}`, prefix);
	}

	return [...prefixes.values()];
}

function unique<T>(values: readonly T[]): readonly T[] {
	return [...new Set(values)];
}
