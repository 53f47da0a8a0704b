/**
The difference between what the kernel holds and what it should hold, as steps. Pure: no I/O, no clock.
*/
import type {ExemptionKey, NetnsCookie, PodInfo, PodValue, PrefixKey, PrefixValue} from '../maps/schema.js';
import type {PodPolicy} from './policy.js';

/** The maps as read from the kernel. */
export interface KernelState {
	readonly pods: ReadonlyMap<NetnsCookie, PodValue>;
	readonly infos: ReadonlyMap<NetnsCookie, PodInfo>;
	readonly counters: ReadonlySet<NetnsCookie>;
	readonly prefixes: ReadonlyArray<readonly [PrefixKey, PrefixValue]>;
	readonly exemptions: readonly ExemptionKey[];
}

export type Step =
	| {readonly do: 'put prefix'; readonly key: PrefixKey; readonly value: PrefixValue}
	| {readonly do: 'put exemption'; readonly key: ExemptionKey}
	| {readonly do: 'put counters'; readonly cookie: NetnsCookie}
	| {readonly do: 'put info'; readonly cookie: NetnsCookie; readonly info: Omit<PodInfo, 'enrolledAtMs'>; readonly enrolledAtMs: bigint | undefined}
	| {readonly do: 'put pod'; readonly cookie: NetnsCookie; readonly pod: PodValue}
	| {readonly do: 'delete pod' | 'delete info' | 'delete counters'; readonly cookie: NetnsCookie}
	| {readonly do: 'delete prefix'; readonly key: PrefixKey}
	| {readonly do: 'delete exemption'; readonly key: ExemptionKey};

/** Steps that belong together: if one fails, those before it are undone, and other changes go on. */
export interface Change {
	readonly kind: 'enrol' | 'update' | 'remove' | 'sweep';
	/** The pod's name; empty for a sweep. */
	readonly pod: string;
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
	return [...removals, {kind: 'sweep' as const, pod: '', steps: orphans}, ...changes].filter(({steps}) => steps.length > 0);
}

function remove(actual: KernelState, lists: PolicyLists, cookie: NetnsCookie): Change {
	const pod = actual.pods.get(cookie);
	return {
		kind: 'remove',
		pod: actual.infos.get(cookie)?.name ?? `netns ${cookie}`,
		steps: [
			...(pod ? [{do: 'delete pod' as const, cookie}] : []),
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
			...wanted.prefixes.map(({address, bits, kind}): Step => ({do: 'put prefix', key: {bits: 32 + bits, policy, address}, value: {kind}})),
			...wanted.exemptions.map((exemption): Step => ({do: 'put exemption', key: {policy, ...exemption}})),
		);
	}

	if (!actual.counters.has(cookie)) {
		steps.push({do: 'put counters', cookie});
	}

	if (!info || !isSame({...wanted.info, enrolledAtMs: info.enrolledAtMs}, info)) {
		steps.push({do: 'put info', cookie, info: wanted.info, enrolledAtMs: now ? info?.enrolledAtMs : undefined});
	}

	if (!now || !isSame(pod, now)) {
		steps.push({do: 'put pod', cookie, pod});
	}

	if (now && !sameLists) {
		steps.push(...lists.deletions(now.policy));
	}

	return {kind: now ? 'update' : 'enrol', pod: wanted.info.name, steps};
}

/** Ids that neither a pod nor a left-over list entry uses. */
function policyIds(actual: KernelState): () => number {
	const used = new Set([...[...actual.pods.values()].map(({policy}) => policy), ...actual.prefixes.map(([{policy}]) => policy), ...actual.exemptions.map(({policy}) => policy)]);
	let last = Math.max(0, ...used);
	return () => {
		do {
			last = last >= 0xff_ff_ff_ff ? 1 : last + 1;
		} while (used.has(last));

		used.add(last);
		return last;
	};
}

/** The list entries in the kernel, by policy. */
class PolicyLists {
	readonly #prefixes = new Map<number, Map<string, readonly [PrefixKey, PrefixValue]>>();
	readonly #exemptions = new Map<number, Map<string, ExemptionKey>>();

	constructor(actual: KernelState) {
		for (const entry of actual.prefixes) {
			inner(this.#prefixes, entry[0].policy).set(prefixId(entry[0].address, entry[0].bits, entry[1].kind), entry);
		}

		for (const key of actual.exemptions) {
			inner(this.#exemptions, key.policy).set(exemptionId(key), key);
		}
	}

	policies(): readonly number[] {
		return [...new Set([...this.#prefixes.keys(), ...this.#exemptions.keys()])];
	}

	equal(policy: number, wanted: PodPolicy): boolean {
		const prefixes = this.#prefixes.get(policy);
		const exemptions = this.#exemptions.get(policy);
		return (prefixes?.size ?? 0) === wanted.prefixes.length
			&& (exemptions?.size ?? 0) === wanted.exemptions.length
			&& wanted.prefixes.every(({address, bits, kind}) => prefixes!.has(prefixId(address, 32 + bits, kind)))
			&& wanted.exemptions.every(exemption => exemptions!.has(exemptionId(exemption)));
	}

	deletions(policy: number): readonly Step[] {
		return [
			...[...this.#prefixes.get(policy)?.values() ?? []].map(([key]): Step => ({do: 'delete prefix', key})),
			...[...this.#exemptions.get(policy)?.values() ?? []].map((key): Step => ({do: 'delete exemption', key})),
		];
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

const prefixId = (address: string, bits: number, kind: string) => `${address}/${bits} ${kind}`;
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
