/**
Carries a plan out on the kernel's maps.
*/
import {TornChangeError} from '../errors.js';
import type {Datapath} from '../loader/datapath.js';
import type {Counters, Maps, Traffic} from '../maps/schema.js';
import {KernelIndex, type Change, type Step} from './plan.js';

export function readKernel({pods, podInfo, counters, traffic, prefixes, ports, exemptions, addresses}: Maps): KernelIndex {
	const counted = new Set(counters.keys());
	const measured = new Set(traffic.keys());
	return new KernelIndex({
		pods: new Map(pods.entries()),
		infos: new Map(podInfo.entries()),
		counters: new Set([...counted].filter(cookie => measured.has(cookie))),
		halfCounted: new Set([...counted, ...measured].filter(cookie => !counted.has(cookie) || !measured.has(cookie))),
		prefixes: prefixes.entries(),
		ports: ports.entries(),
		addresses: addresses.entries(),
		exemptions: exemptions.entries().map(([key]) => key),
	});
}

/**
Does one change, wholly or not at all.

@throws MapFullError, or the kernel's error, after the steps done so far were undone; TornChangeError when they could not be.
*/
export function applyChange({maps, schema}: Pick<Datapath, 'maps' | 'schema'>, change: Change, nowMs = Date.now()): void {
	const none = {bytes: 0n, messages: 0n};
	const direction = {redirected: none, passed: schema.tcpReasons.map(() => none)};
	const zero: Zero = {counters: {count: schema.reasons.map(() => 0n)}, traffic: {sentByClient: direction, sentByServer: direction}};
	const undo: Array<() => void> = [];
	try {
		for (const step of change.steps) {
			applyStep(maps, step, zero, nowMs, undo);
		}
	} catch (error) {
		try {
			// Not beyond one that fails: what it leaves in force may need what those before it would take away.
			for (const revert of undo.reverse()) {
				revert();
			}
		} catch (undoing) {
			throw new TornChangeError(undoing, {cause: error});
		}

		throw error;
	}
}

interface Zero {
	readonly counters: Counters;
	readonly traffic: Traffic;
}

/** @param undo - gets what undoes it. */
function applyStep(maps: Maps, step: Step, zero: Zero, nowMs: number, undo: Array<() => void>): void {
	switch (step.do) {
		case 'put prefix': {
			maps.prefixes.set(step.key, step.value);
			undo.push(() => maps.prefixes.delete(step.key));
			break;
		}

		case 'put port': {
			maps.ports.set(step.key, step.value);
			undo.push(() => maps.ports.delete(step.key));
			break;
		}

		case 'put address': {
			undo.push(put(maps.addresses, step.key, step.cookie));
			break;
		}

		case 'put exemption': {
			maps.exemptions.set(step.key, {present: 1});
			undo.push(() => maps.exemptions.delete(step.key));
			break;
		}

		case 'put counters': {
			maps.traffic.set(step.cookie, zero.traffic);
			undo.push(() => maps.traffic.delete(step.cookie));
			maps.counters.set(step.cookie, zero.counters);
			undo.push(() => maps.counters.delete(step.cookie));
			break;
		}

		case 'put info': {
			// A pod that was not captured when it was written about is enrolled now.
			const before = maps.podInfo.get(step.cookie);
			const enrolledAtMs = (maps.pods.get(step.cookie) && before?.enrolledAtMs) ?? BigInt(nowMs);
			undo.push(put(maps.podInfo, step.cookie, {...step.info, enrolledAtMs, namespaceChanges: before?.namespaceChanges ?? 0}));
			break;
		}

		case 'put pod': {
			undo.push(put(maps.pods, step.cookie, step.pod));
			break;
		}

		case 'delete pod': {
			undo.push(remove(maps.pods, step.cookie));
			break;
		}

		case 'delete info': {
			undo.push(remove(maps.podInfo, step.cookie));
			break;
		}

		case 'delete counters': {
			maps.traffic.delete(step.cookie);
			undo.push(() => {
				maps.traffic.set(step.cookie, zero.traffic);
			});
			maps.counters.delete(step.cookie);
			undo.push(() => {
				maps.counters.set(step.cookie, zero.counters);
			});
			break;
		}

		case 'delete prefix': {
			undo.push(remove(maps.prefixes, step.key));
			break;
		}

		case 'delete port': {
			undo.push(remove(maps.ports, step.key));
			break;
		}

		case 'delete address': {
			undo.push(remove(maps.addresses, step.key));
			break;
		}

		case 'delete exemption': {
			undo.push(remove(maps.exemptions, step.key));
			break;
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
