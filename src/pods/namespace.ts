/**
What capture needs inside a pod's namespace beyond programs: so that the answers to a kept source come back over lo (KEEP_SOURCE), and so that a sidecar's
proxy can bind ::6. Made at each round if it is not there; what was not there before is taken away at the end, and nothing else.
*/
import {reasonOf} from '../errors.js';
import {addressToBytes} from '../maps/address.js';
import {
	KEPT_SOURCE_MARK, KEPT_SOURCE_MASK, NAMESPACE_ACCEPT, NAMESPACE_PASSTHROUGH, NAMESPACE_REFLECT4, NAMESPACE_REFLECT6, NAMESPACE_ROUTE4, NAMESPACE_ROUTE6, NAMESPACE_RULE4,
	NAMESPACE_RULE6, POD_KEEP_SOURCE, POD_SIDECAR, type Maps, type NetnsCookie,
} from '../maps/schema.js';
import type {NetNs} from '../native.js';
import {PASSTHROUGH_ADDRESS, type PodPolicy} from '../redirect/policy.js';

/** Istio's numbers (cni/pkg/iptables): whoever looks with `ip rule` finds what they know. */
const TABLE = 100;
const PRIORITY = 32_764;
const RTN_LOCAL = 2;

interface Readable extends Pick<NetNs, 'rules' | 'routes' | 'addresses'> {
	isOn(sysctl: string): boolean;
}

/** Reads each thing once, and all of these sysctls together. */
function readOnce(netns: NetNs, proc: string, sysctls: readonly string[]): Readable {
	const once = <T>(read: () => T): (() => T) => {
		let value: T | undefined;
		return () => value ??= read();
	};

	const values = once(() => netns.sysctls(proc, sysctls));
	return {rules: once(() => netns.rules()), routes: once(() => netns.routes()), addresses: once(() => netns.addresses()), isOn: sysctl => values()[sysctls.indexOf(sysctl)] === '1'};
}

interface Change {
	readonly bit: number;
	/** For people. */
	readonly name: string;
	/** What it switches on. */
	readonly sysctl?: string;
	isMade(netns: Readable): boolean;
	make(netns: NetNs, proc: string): void;
	undo(netns: NetNs, proc: string): void;
}

const rule = (bit: number, family: 4 | 6): Change => {
	const wanted = {family, priority: PRIORITY, table: TABLE, mark: KEPT_SOURCE_MARK, mask: KEPT_SOURCE_MASK};
	return {
		bit,
		name: `ip -${family} rule fwmark 0x111/0xfff lookup ${TABLE}`,
		isMade: netns => netns.rules().some(({family, table, mark, mask}) => family === wanted.family && table === TABLE && mark === KEPT_SOURCE_MARK && mask === KEPT_SOURCE_MASK),
		make: netns => netns.changeRule('add', wanted),
		undo: netns => netns.changeRule('delete', wanted),
	};
};

const defaultRoute = (bit: number, family: 4 | 6): Change => {
	const wanted = {address: new Uint8Array(family === 4 ? 4 : 16), prefixLength: 0, interfaceName: 'lo', table: TABLE};
	return {
		bit,
		name: `ip -${family} route local default dev lo table ${TABLE}`,
		isMade: netns => netns.routes().some(route => route.family === family && route.table === TABLE && route.type === RTN_LOCAL && route.prefixLength === 0),
		make: netns => netns.changeLocalRoute('add', wanted),
		undo: netns => netns.changeLocalRoute('delete', wanted),
	};
};

const switchOn = (bit: number, name: string): Change => ({
	bit,
	name,
	sysctl: name,
	isMade: netns => netns.isOn(name),
	make: (netns, proc) => netns.setSysctl(proc, name, '1'),
	undo: (netns, proc) => netns.setSysctl(proc, name, '0'),
});

const passthrough: Change = {
	bit: NAMESPACE_PASSTHROUGH,
	name: `${PASSTHROUGH_ADDRESS}/128 dev lo`,
	isMade: netns => netns.addresses().some(({address, isLoopback}) => isLoopback && Buffer.compare(address, PASSTHROUGH.address) === 0),
	make: netns => netns.changeAddress('add', PASSTHROUGH),
	undo: netns => netns.changeAddress('delete', PASSTHROUGH),
};
const PASSTHROUGH = {address: addressToBytes(PASSTHROUGH_ADDRESS), prefixLength: 128, interfaceName: 'lo'};

const accept = switchOn(NAMESPACE_ACCEPT, 'net/ipv4/tcp_fwmark_accept');
const KEEP_SOURCE4 = [
	rule(NAMESPACE_RULE4, 4),
	defaultRoute(NAMESPACE_ROUTE4, 4),
	accept,
	// Without it the reset of a closed port leaves by eth0, and the proxy waits for nothing.
	switchOn(NAMESPACE_REFLECT4, 'net/ipv4/fwmark_reflect'),
];
const KEEP_SOURCE6 = [
	rule(NAMESPACE_RULE6, 6),
	defaultRoute(NAMESPACE_ROUTE6, 6),
	accept,
	switchOn(NAMESPACE_REFLECT6, 'net/ipv6/fwmark_reflect'),
];
const ALL = new Map([...KEEP_SOURCE4, ...KEEP_SOURCE6, passthrough].map(change => [change.bit, change]));

function changesFor({pod, info}: PodPolicy): readonly Change[] {
	const keepsSource = (pod.flags & POD_KEEP_SOURCE) !== 0;
	// One is in both.
	return [...new Set([
		...(keepsSource && info.address4 ? KEEP_SOURCE4 : []),
		...(keepsSource && info.address6 ? KEEP_SOURCE6 : []),
		...(pod.flags & POD_SIDECAR && info.address6 ? [passthrough] : []),
	])];
}

/**
Makes what is missing, and undoes what a former policy needed.

@param proc - a writable mount of the host's /proc.
@returns whether anything had to be changed.
*/
export function prepareNamespace({podInfo}: Pick<Maps, 'podInfo'>, policy: PodPolicy, netns: NetNs, proc: string): boolean {
	const wanted = changesFor(policy);
	const read = () => readOnce(netns, proc, wanted.flatMap(({sysctl}) => sysctl ?? []));
	const now = read();
	const missing = wanted.filter(change => !change.isMade(now));
	const info = podInfo.get(policy.cookie)!;
	const stale = [...ALL.values()].filter(({bit}) => info.namespaceChanges & bit && !wanted.some(change => change.bit === bit));
	if (missing.length + stale.length === 0) {
		return false;
	}

	// Written first: if we die in between, whoever takes it back finds something already gone, instead of leaving something behind.
	const kept = stale.reduce((bits, {bit}) => bits & ~bit, info.namespaceChanges);
	podInfo.set(policy.cookie, {...info, namespaceChanges: missing.reduce((bits, {bit}) => bits | bit, info.namespaceChanges)});
	for (const change of missing) {
		change.make(netns, proc);
	}

	const then = read();
	for (const change of missing) {
		if (!change.isMade(then)) {
			throw new Error(`\`${change.name}\` cannot be made, as something else is in its place`);
		}
	}

	for (const change of stale) {
		change.undo(netns, proc);
	}

	podInfo.set(policy.cookie, {...info, namespaceChanges: missing.reduce((bits, {bit}) => bits | bit, kept)});
	return true;
}

/**
Takes back what was made: all that is possible.

@throws Error that names what was not; that much stays written down.
*/
export function restoreNamespace({podInfo}: Pick<Maps, 'podInfo'>, cookie: NetnsCookie, netns: NetNs, proc: string): void {
	const info = podInfo.get(cookie)!;
	let left = 0;
	const failures: string[] = [];
	for (const [bit, change] of ALL) {
		try {
			if (info.namespaceChanges & bit) {
				change.undo(netns, proc);
			}
		} catch (error) {
			left |= bit;
			failures.push(`${change.name} (${reasonOf(error)})`);
		}
	}

	if (failures.length > 0) {
		podInfo.set(cookie, {...info, namespaceChanges: left});
		throw new Error(failures.join(', '));
	}
}

/** Connections that the proxy makes under clients' addresses depend on these. */
export const KEEPS_SOURCES = KEEP_SOURCE6.reduce((bits, {bit}) => bits | bit, 0);
