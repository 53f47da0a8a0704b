/**
The difference between what the kernel holds and what it should hold, as steps. Pure: no I/O, no clock.
*/
import type {AddressKey, ExemptionKey, NetnsCookie, PodInfo, PodValue, PortKey, PortValue, PrefixKey, PrefixValue} from '../maps/schema.js';
import type {PodPolicy} from './policy.js';

/** The maps as read from the kernel. */
export interface KernelState {
	readonly pods: ReadonlyMap<NetnsCookie, PodValue>;
	readonly infos: ReadonlyMap<NetnsCookie, PodInfo>;
	readonly counters: ReadonlySet<NetnsCookie>;
	readonly prefixes: ReadonlyArray<readonly [PrefixKey, PrefixValue]>;
	readonly ports: ReadonlyArray<readonly [PortKey, PortValue]>;
	readonly exemptions: readonly ExemptionKey[];
	readonly addresses: ReadonlyArray<readonly [AddressKey, NetnsCookie]>;
}

export type Step =
	| {readonly do: 'put port'; readonly key: PortKey; readonly value: PortValue}
	| {readonly do: 'put address'; readonly key: AddressKey; readonly cookie: NetnsCookie}
	| {readonly do: 'put prefix'; readonly key: PrefixKey; readonly value: PrefixValue}
	| {readonly do: 'put exemption'; readonly key: ExemptionKey}
	| {readonly do: 'put counters'; readonly cookie: NetnsCookie}
	| {readonly do: 'put info'; readonly cookie: NetnsCookie; readonly info: PodPolicy['info']}
	| {readonly do: 'put pod'; readonly cookie: NetnsCookie; readonly pod: PodValue}
	| {readonly do: 'delete pod' | 'delete info' | 'delete counters'; readonly cookie: NetnsCookie}
	| {readonly do: 'delete prefix'; readonly key: PrefixKey}
	| {readonly do: 'delete port'; readonly key: PortKey}
	| {readonly do: 'delete address'; readonly key: AddressKey}
	| {readonly do: 'delete exemption'; readonly key: ExemptionKey};

/** Steps that belong together: if one fails, those before it are undone, and other changes go on. */
export interface Change {
	readonly kind: 'enrol' | 'update' | 'remove' | 'sweep';
	/** The pod's name; empty for a sweep. */
	readonly pod: string;
	/** 0 for a sweep. */
	readonly cookie: NetnsCookie;
	readonly steps: readonly Step[];
}

/**
Removals come first, so that room they leave can be used. Inside a change, additions come before the one write that makes them visible, and deletions
after the one that makes them unused.

@param keep - pods that are neither desired nor to be removed now: their namespace could not be read this time.
*/
export function plan(actual: KernelState, desired: readonly PodPolicy[], keep: ReadonlySet<NetnsCookie> = new Set()): readonly Change[] {
	const wanted = new Set(desired.map(({cookie}) => cookie));
	const lists = new PolicyLists(actual);
	const nextPolicy = policyIds(actual);

	const removals = [...new Set([...actual.pods.keys(), ...actual.infos.keys(), ...actual.counters])]
		.filter(cookie => !wanted.has(cookie) && !keep.has(cookie))
		.map(cookie => remove(actual, lists, cookie));
	const changes = desired.map(policy => enrol(actual, lists, policy, nextPolicy));

	const named = new Set([...actual.pods.values()].map(({policy}) => policy));
	const orphans = lists.policies().filter(policy => !named.has(policy)).flatMap(policy => lists.deletions(policy));
	return [...removals, {kind: 'sweep' as const, pod: '', cookie: 0n, steps: orphans}, ...changes].filter(({steps}) => steps.length > 0);
}

function remove(actual: KernelState, lists: PolicyLists, cookie: NetnsCookie): Change {
	const pod = actual.pods.get(cookie);
	return {
		kind: 'remove',
		pod: actual.infos.get(cookie)?.name ?? `netns ${cookie}`,
		cookie,
		steps: [
			...(pod ? [{do: 'delete pod' as const, cookie}] : []),
			...addressesOf(actual, cookie).map(key => ({do: 'delete address' as const, key})),
			...(pod ? lists.deletions(pod.policy) : []),
			...(actual.counters.has(cookie) ? [{do: 'delete counters' as const, cookie}] : []),
			...(actual.infos.has(cookie) ? [{do: 'delete info' as const, cookie}] : []),
		],
	};
}

function enrol(actual: KernelState, lists: PolicyLists, wanted: PodPolicy, nextPolicy: () => number): Change {
	const {cookie} = wanted;
	const now = actual.pods.get(cookie);
	const info = actual.infos.get(cookie);
	const sameLists = now !== undefined && lists.equal(now.policy, wanted);
	const policy = sameLists ? now.policy : nextPolicy();
	const pod: PodValue = {policy, ...wanted.pod};

	const steps: Step[] = [];
	if (!sameLists) {
		steps.push(
			...wanted.prefixes.map(({address, bits, flags}): Step => ({do: 'put prefix', key: {bits: 32 + bits, policy, address}, value: {flags}})),
			...wanted.ports.map(({port, flags}): Step => ({do: 'put port', key: {policy, port}, value: {flags}})),
			...wanted.exemptions.map((exemption): Step => ({do: 'put exemption', key: {policy, ...exemption}})),
		);
	}

	if (!actual.counters.has(cookie)) {
		steps.push({do: 'put counters', cookie});
	}

	if (!info || !now || !isSame({...info, ...wanted.info}, info)) {
		steps.push({do: 'put info', cookie, info: wanted.info});
	}

	const addresses = addressesOf(actual, cookie);
	steps.push(...wanted.addresses.filter(key => !addresses.some(there => isSame(key, there))).map((key): Step => ({do: 'put address', key, cookie})));

	if (!now || !isSame(pod, now)) {
		steps.push({do: 'put pod', cookie, pod});
	}

	if (now && !sameLists) {
		steps.push(...lists.deletions(now.policy));
	}

	steps.push(...addresses.filter(key => !wanted.addresses.some(other => isSame(key, other))).map((key): Step => ({do: 'delete address', key})));
	return {kind: now ? 'update' : 'enrol', pod: wanted.info.name, cookie, steps};
}

function addressesOf(actual: KernelState, cookie: NetnsCookie): readonly AddressKey[] {
	return actual.addresses.filter(([, netns]) => netns === cookie).map(([key]) => key);
}

/** Ids that neither a pod nor a left-over list entry uses. */
function policyIds(actual: KernelState): () => number {
	const used = new Set([...[...actual.pods.values()].map(({policy}) => policy), ...actual.prefixes.map(([{policy}]) => policy), ...actual.ports.map(([{policy}]) => policy), ...actual.exemptions.map(({policy}) => policy)]);
	let last = Math.max(0, ...used);
	return () => {
		do {
			last = last >= 0xff_ff_ff_ff ? 1 : last + 1;
		} while (used.has(last));

		used.add(last);
		return last;
	};
}

/** The list entries in the kernel, by policy: each as its identity, and the step that takes it away. */
class PolicyLists {
	readonly #entries = new Map<number, Map<string, Step>>();

	constructor({prefixes, ports, exemptions}: KernelState) {
		for (const [key, {flags}] of prefixes) {
			inner(this.#entries, key.policy).set(prefixId(key.address, key.bits, flags), {do: 'delete prefix', key});
		}

		for (const [key, {flags}] of ports) {
			inner(this.#entries, key.policy).set(portId(key.port, flags), {do: 'delete port', key});
		}

		for (const key of exemptions) {
			inner(this.#entries, key.policy).set(exemptionId(key), {do: 'delete exemption', key});
		}
	}

	policies(): readonly number[] {
		return [...this.#entries.keys()];
	}

	equal(policy: number, wanted: PodPolicy): boolean {
		const entries = this.#entries.get(policy);
		const ids = [
			...wanted.prefixes.map(({address, bits, flags}) => prefixId(address, 32 + bits, flags)),
			...wanted.ports.map(({port, flags}) => portId(port, flags)),
			...wanted.exemptions.map(exemption => exemptionId(exemption)),
		];
		return (entries?.size ?? 0) === ids.length && ids.every(id => entries!.has(id));
	}

	deletions(policy: number): readonly Step[] {
		return [...this.#entries.get(policy)?.values() ?? []];
	}
}

function inner<V>(outer: Map<number, Map<string, V>>, key: number): Map<string, V> {
	const existing = outer.get(key);
	if (existing) {
		return existing;
	}

	const made = new Map<string, V>();
	outer.set(key, made);
	return made;
}

const prefixId = (address: string, bits: number, flags: number) => `${address}/${bits} ${flags}`;
const portId = (port: number, flags: number) => `port ${port} ${flags}`;
const exemptionId = ({kind, id}: Omit<ExemptionKey, 'policy'>) => `${kind} ${id}`;

/** Of plain values, arrays and objects, bigints included. */
function isSame(a: unknown, b: unknown): boolean {
	if (typeof a !== 'object' || a === null || typeof b !== 'object' || b === null) {
		return a === b;
	}

	const keys = Object.keys(a);
	return keys.length === Object.keys(b).length
		&& keys.every(key => isSame((a as Record<string, unknown>)[key], (b as Record<string, unknown>)[key]));
}
