/**
Carries a plan out on the kernel's maps.
*/
import type {Datapath} from '../loader/datapath.js';
import type {Counters, Maps, Traffic} from '../maps/schema.js';
import {KernelIndex, type Change, type Step} from './plan.js';

export function readKernel({pods, podInfo, counters, prefixes, ports, exemptions, addresses}: Maps): KernelIndex {
	return new KernelIndex({
		pods: new Map(pods.entries()),
		infos: new Map(podInfo.entries()),
		counters: new Set(counters.entriesPerCpu().map(([cookie]) => cookie)),
		prefixes: prefixes.entries(),
		ports: ports.entries(),
		addresses: addresses.entries(),
		exemptions: exemptions.entries().map(([key]) => key),
	});
}

/**
Does one change, wholly or not at all.

@throws MapFullError, or the kernel's error, after the steps done so far were undone.
*/
export function applyChange({maps, schema}: Pick<Datapath, 'maps' | 'schema'>, change: Change, nowMs = Date.now()): void {
	const none = {bytes: 0n, messages: 0n};
	const direction = {redirected: none, passed: schema.tcpReasons.map(() => none)};
	const zero: Zero = {counters: {count: schema.reasons.map(() => 0n)}, traffic: {sentByClient: direction, sentByServer: direction}};
	const undo: Array<() => void> = [];
	try {
		for (const step of change.steps) {
			undo.push(applyStep(maps, step, zero, nowMs));
		}
	} catch (error) {
		for (const revert of undo.reverse()) {
			revert();
		}

		throw error;
	}
}

interface Zero {
	readonly counters: Counters;
	readonly traffic: Traffic;
}

/** @returns what undoes it. */
function applyStep(maps: Maps, step: Step, zero: Zero, nowMs: number): () => void {
	switch (step.do) {
		case 'put prefix': {
			maps.prefixes.set(step.key, step.value);
			return () => maps.prefixes.delete(step.key);
		}

		case 'put port': {
			maps.ports.set(step.key, step.value);
			return () => maps.ports.delete(step.key);
		}

		case 'put address': {
			return put(maps.addresses, step.key, step.cookie);
		}

		case 'put exemption': {
			maps.exemptions.set(step.key, {present: 1});
			return () => maps.exemptions.delete(step.key);
		}

		case 'put counters': {
			// Where there are counters, traffic is or was: so whoever dies in between leaves what the next one mends.
			maps.traffic.set(step.cookie, zero.traffic);
			try {
				maps.counters.set(step.cookie, zero.counters);
			} catch (error) {
				maps.traffic.delete(step.cookie);
				throw error;
			}

			return () => {
				maps.traffic.delete(step.cookie);
				maps.counters.delete(step.cookie);
			};
		}

		case 'put info': {
			// A pod that was not captured when it was written about is enrolled now.
			const before = maps.podInfo.get(step.cookie);
			const enrolledAtMs = (maps.pods.get(step.cookie) && before?.enrolledAtMs) ?? BigInt(nowMs);
			return put(maps.podInfo, step.cookie, {...step.info, enrolledAtMs, namespaceChanges: before?.namespaceChanges ?? 0});
		}

		case 'put pod': {
			return put(maps.pods, step.cookie, step.pod);
		}

		case 'delete pod': {
			return remove(maps.pods, step.cookie);
		}

		case 'delete info': {
			return remove(maps.podInfo, step.cookie);
		}

		case 'delete counters': {
			maps.traffic.delete(step.cookie);
			maps.counters.delete(step.cookie);
			return () => {
				maps.traffic.set(step.cookie, zero.traffic);
				maps.counters.set(step.cookie, zero.counters);
			};
		}

		case 'delete prefix': {
			return remove(maps.prefixes, step.key);
		}

		case 'delete port': {
			return remove(maps.ports, step.key);
		}

		case 'delete address': {
			return remove(maps.addresses, step.key);
		}

		case 'delete exemption': {
			return remove(maps.exemptions, step.key);
		}
	}
}

interface Entries<K, V> {
	get(key: K): V | undefined;
	set(key: K, value: V): void;
	delete(key: K): boolean;
}

function put<K, V>(map: Entries<K, V>, key: K, value: V): () => void {
	const before = map.get(key);
	map.set(key, value);
	return () => {
		if (before === undefined) {
			map.delete(key);
		} else {
			map.set(key, before);
		}
	};
}

function remove<K, V>(map: Entries<K, V>, key: K): () => void {
	const before = map.get(key);
	map.delete(key);
	return () => {
		if (before !== undefined) {
			map.set(key, before);
		}
	};
}
