/**
The difference between what the kernel holds and what it should hold, as steps. Pure: no I/O, no clock.
*/
import type {AddressKey, ExemptionKey, NetnsCookie, PodInfo, PodValue, PortKey, PortValue, PrefixKey, PrefixValue} from '../maps/schema.js';
import type {PodPolicy} from './policy.js';

/** The maps as read from the kernel. */
export interface KernelState {
	readonly pods: ReadonlyMap<NetnsCookie, PodValue>;
	readonly infos: ReadonlyMap<NetnsCookie, PodInfo>;
	/** Those that have an entry in each of the two maps of counts, and those that have it in one only, as whoever died in between leaves them. */
	readonly counters: ReadonlySet<NetnsCookie>;
	readonly halfCounted: ReadonlySet<NetnsCookie>;
	readonly prefixes: ReadonlyArray<readonly [PrefixKey, PrefixValue]>;
	readonly ports: ReadonlyArray<readonly [PortKey, PortValue]>;
	readonly exemptions: readonly ExemptionKey[];
	readonly addresses: ReadonlyArray<readonly [AddressKey, NetnsCookie]>;
}

/** Writes one entry of a policy's lists. */
type ListStep =
	| {readonly do: 'put prefix'; readonly key: PrefixKey; readonly value: PrefixValue}
	| {readonly do: 'put port'; readonly key: PortKey; readonly value: PortValue}
	| {readonly do: 'put exemption'; readonly key: ExemptionKey};

export type Step =
	| ListStep
	| {readonly do: 'put address'; readonly key: AddressKey; readonly cookie: NetnsCookie}
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
What the kernel holds, by pod and by policy, so that a change of one pod costs what that pod has. Kept equal to the maps by {@link KernelIndex.record}; what somebody else
writes meanwhile, only a new one shows.
*/
export class KernelIndex {
	readonly pods: Map<NetnsCookie, PodValue>;
	readonly infos: Map<NetnsCookie, PodInfo>;
	readonly counters: Set<NetnsCookie>;
	readonly halfCounted: Set<NetnsCookie>;
	readonly #addresses = new Map<NetnsCookie, Map<string, AddressKey>>();
	readonly #lists = new Map<number, Map<string, {readonly flags: number; readonly deletion: Step}>>();
	#lastPolicy = 0;

	constructor({pods, infos, counters, halfCounted, prefixes, ports, exemptions, addresses}: KernelState) {
		this.pods = new Map(pods);
		this.infos = new Map(infos);
		this.counters = new Set(counters);
		this.halfCounted = new Set(halfCounted);
		for (const [key, cookie] of addresses) {
			inner(this.#addresses, cookie).set(addressId(key), key);
		}

		for (const [key, value] of prefixes) {
			this.#put({do: 'put prefix', key, value});
		}

		for (const [key, value] of ports) {
			this.#put({do: 'put port', key, value});
		}

		for (const key of exemptions) {
			this.#put({do: 'put exemption', key});
		}

		this.#lastPolicy = Math.max(0, ...[...pods.values()].map(({policy}) => policy), ...this.#lists.keys());
	}

	/** A policy id that neither a pod nor a left-over list entry uses. */
	freshPolicy(): number {
		const used = new Set([...this.pods.values()].map(({policy}) => policy));
		do {
			this.#lastPolicy = this.#lastPolicy >= 0xff_ff_ff_ff ? 1 : this.#lastPolicy + 1;
		} while (used.has(this.#lastPolicy) || this.#lists.has(this.#lastPolicy));

		return this.#lastPolicy;
	}

	addressesOf(cookie: NetnsCookie): ReadonlyMap<string, AddressKey> {
		return this.#addresses.get(cookie) ?? new Map();
	}

	/** Addresses, by {@link addressId}, of some pods. */
	owners(cookies: ReadonlySet<NetnsCookie>): ReadonlyMap<string, NetnsCookie> {
		return new Map([...cookies].flatMap(cookie => [...this.addressesOf(cookie).keys()].map(id => [id, cookie] as const)));
	}

	/** Whoever has an address. */
	addressed(): readonly NetnsCookie[] {
		return [...this.#addresses].filter(([, addresses]) => addresses.size > 0).map(([cookie]) => cookie);
	}

	policies(): readonly number[] {
		return [...this.#lists.keys()];
	}

	hasLists(policy: number, wanted: PodPolicy): boolean {
		const entries = this.#lists.get(policy);
		const steps = listSteps(policy, wanted);
		return (entries?.size ?? 0) === steps.length && steps.every(step => entries!.get(listId(step.key))?.flags === flagsOf(step));
	}

	deletions(policy: number): readonly Step[] {
		return [...this.#lists.get(policy)?.values() ?? []].map(({deletion}) => deletion);
	}

	/** That these steps were done. What is written about a pod (`infos`) the caller reads again, as it is more than the step says. */
	record({steps}: Change): void {
		for (const step of steps) {
			this.#recordStep(step);
		}
	}

	#recordStep(step: Step): void {
		switch (step.do) {
			case 'put prefix':
			case 'put port':
			case 'put exemption': {
				this.#put(step);
				break;
			}

			case 'delete prefix':
			case 'delete port':
			case 'delete exemption': {
				const entries = this.#lists.get(step.key.policy);
				entries?.delete(listId(step.key));
				if (entries?.size === 0) {
					this.#lists.delete(step.key.policy);
				}

				break;
			}

			case 'put address': {
				const id = addressId(step.key);
				for (const others of this.#addresses.values()) {
					others.delete(id);
				}

				inner(this.#addresses, step.cookie).set(id, step.key);
				break;
			}

			case 'delete address': {
				const id = addressId(step.key);
				for (const addresses of this.#addresses.values()) {
					addresses.delete(id);
				}

				break;
			}

			case 'put counters': {
				this.counters.add(step.cookie);
				this.halfCounted.delete(step.cookie);
				break;
			}

			case 'put pod': {
				this.pods.set(step.cookie, step.pod);
				break;
			}

			case 'delete pod': {
				this.pods.delete(step.cookie);
				break;
			}

			case 'delete info': {
				this.infos.delete(step.cookie);
				break;
			}

			case 'delete counters': {
				this.counters.delete(step.cookie);
				this.halfCounted.delete(step.cookie);
				break;
			}

			case 'put info': {
				break;
			}
		}
	}

	#put(step: ListStep): void {
		inner(this.#lists, step.key.policy).set(listId(step.key), {flags: flagsOf(step), deletion: deletionOf(step)});
	}
}

/**
Removals come first, so that room they leave can be used. Inside a change, additions come before the one write that makes them visible, and deletions
after the one that makes them unused.

@param due - those of the wanted pods that may differ from what the kernel has.
@param keep - everything else that stays: wanted pods that are as they should be, and pods whose namespace could not be read this time.
*/
export function plan(kernel: KernelIndex, due: readonly PodPolicy[], keep: ReadonlySet<NetnsCookie> = new Set()): readonly Change[] {
	const wanted = new Set(due.map(({cookie}) => cookie));
	const removals = [...new Set([...kernel.pods.keys(), ...kernel.infos.keys(), ...kernel.counters, ...kernel.halfCounted, ...kernel.addressed()])]
		.filter(cookie => !wanted.has(cookie) && !keep.has(cookie))
		.map(cookie => remove(kernel, cookie));
	const taken = new Set(due.flatMap(({addresses}) => addresses.map(key => addressId(key))));
	const changes = due.map(policy => enrol(kernel, policy, taken));

	const named = new Set([...kernel.pods.values()].map(({policy}) => policy));
	const orphans = kernel.policies().filter(policy => !named.has(policy)).flatMap(policy => kernel.deletions(policy));
	return [...removals, {kind: 'sweep' as const, pod: '', cookie: 0n, steps: orphans}, ...changes].filter(({steps}) => steps.length > 0);
}

function remove(kernel: KernelIndex, cookie: NetnsCookie): Change {
	const pod = kernel.pods.get(cookie);
	return {
		kind: 'remove',
		pod: kernel.infos.get(cookie)?.name ?? `netns ${cookie}`,
		cookie,
		steps: [
			...(pod ? [{do: 'delete pod' as const, cookie}] : []),
			...[...kernel.addressesOf(cookie).values()].map(key => ({do: 'delete address' as const, key})),
			...(pod ? kernel.deletions(pod.policy) : []),
			...(kernel.counters.has(cookie) || kernel.halfCounted.has(cookie) ? [{do: 'delete counters' as const, cookie}] : []),
			...(kernel.infos.has(cookie) ? [{do: 'delete info' as const, cookie}] : []),
		],
	};
}

/** @param taken - addresses that a pod is given in the same plan: to take them away would take them from it. */
function enrol(kernel: KernelIndex, wanted: PodPolicy, taken: ReadonlySet<string>): Change {
	const {cookie} = wanted;
	const now = kernel.pods.get(cookie);
	const info = kernel.infos.get(cookie);
	const sameLists = now !== undefined && kernel.hasLists(now.policy, wanted);
	const policy = sameLists ? now.policy : kernel.freshPolicy();
	const pod: PodValue = {policy, ...wanted.pod};

	const steps: Step[] = sameLists ? [] : [...listSteps(policy, wanted)];
	if (!kernel.counters.has(cookie)) {
		steps.push({do: 'put counters', cookie});
	}

	if (!info || !now || !isSame({...info, ...wanted.info}, info)) {
		steps.push({do: 'put info', cookie, info: wanted.info});
	}

	const addresses = kernel.addressesOf(cookie);
	const wantedAddresses = new Set(wanted.addresses.map(key => addressId(key)));
	steps.push(...wanted.addresses.filter(key => !addresses.has(addressId(key))).map((key): Step => ({do: 'put address', key, cookie})));

	if (!now || !isSame(pod, now)) {
		steps.push({do: 'put pod', cookie, pod});
	}

	if (now && !sameLists) {
		steps.push(...kernel.deletions(now.policy));
	}

	steps.push(...[...addresses].filter(([id]) => !wantedAddresses.has(id) && !taken.has(id)).map(([, key]): Step => ({do: 'delete address', key})));
	return {kind: now ? 'update' : 'enrol', pod: wanted.info.name, cookie, steps};
}

/** Writes all lists of a policy. */
function listSteps(policy: number, {prefixes, ports, exemptions}: PodPolicy): readonly ListStep[] {
	return [
		...prefixes.map(({address, bits, flags}): ListStep => ({do: 'put prefix', key: {bits: 32 + bits, policy, address}, value: {flags}})),
		...ports.map(({port, flags}): ListStep => ({do: 'put port', key: {policy, port}, value: {flags}})),
		...exemptions.map((exemption): ListStep => ({do: 'put exemption', key: {policy, ...exemption}})),
	];
}

/** What tells an entry of a policy from its others. */
function listId(key: ListStep['key']): string {
	return 'bits' in key ? `${key.address}/${key.bits}` : 'port' in key ? `port ${key.port}` : `${key.kind} ${key.id}`;
}

function flagsOf(step: ListStep): number {
	return step.do === 'put exemption' ? 0 : step.value.flags;
}

function deletionOf(step: ListStep): Step {
	switch (step.do) {
		case 'put prefix': {
			return {do: 'delete prefix', key: step.key};
		}

		case 'put port': {
			return {do: 'delete port', key: step.key};
		}

		case 'put exemption': {
			return {do: 'delete exemption', key: step.key};
		}
	}
}

export const addressId = ({address, bits}: AddressKey): string => `${address}/${bits}`;

function inner<K, V>(outer: Map<K, Map<string, V>>, key: K): Map<string, V> {
	const existing = outer.get(key);
	if (existing) {
		return existing;
	}

	const made = new Map<string, V>();
	outer.set(key, made);
	return made;
}

/** Of plain values, arrays and objects, bigints included. */
function isSame(a: unknown, b: unknown): boolean {
	if (typeof a !== 'object' || a === null || typeof b !== 'object' || b === null) {
		return a === b;
	}

	const keys = Object.keys(a);
	return keys.length === Object.keys(b).length
		&& keys.every(key => isSame((a as Record<string, unknown>)[key], (b as Record<string, unknown>)[key]));
}
