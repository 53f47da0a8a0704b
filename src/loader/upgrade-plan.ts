/**
What becomes of each map when one layout takes the place of another. Pure.

For the milliseconds in which the hooks are switched, programs of both layouts run. So what one hook or moment hands to another (a connection from its SYN to its
acceptance, what is kept with a socket) has to be in one and the same kernel map for both.
*/
import {findDifference} from '../maps/compare.js';
import {MAP_NAMES, TALLIES, type MapName, type Schema} from '../maps/schema.js';
import type {MapSpec} from '../native.js';

/**
| | |
|---|---|
| keep | the same kernel map goes on |
| copy | made anew, and filled before any program uses it: only the agent writes to it, which is us |
| count | made anew; what was counted in the old one is added when nothing counts there any more |
| make | made anew, and empty |
*/
export type MapFate = 'keep' | 'copy' | 'count' | 'make';

export interface LayoutOfMaps {
	readonly schema: Schema;
	readonly specs: ReadonlyMap<string, MapSpec>;
}

export interface UpgradePlan {
	readonly fates: ReadonlyMap<MapName, MapFate>;
	/** Why there can be no upgrade; empty when there can. */
	readonly obstacles: readonly string[];
}

const WRITTEN_BY_AGENT: readonly MapName[] = ['pods', 'pod_info', 'prefixes', 'ports', 'exemptions', 'addresses', 'node'];
/** What a ring buffer holds; its declaration does not tell. */
const RECORDS: Readonly<Partial<Record<MapName, string>>> = {requests: 'request'};

/** @param changed - maps whose entries a migration converts. */
export function planUpgrade(older: LayoutOfMaps, newer: LayoutOfMaps, changed: ReadonlySet<MapName>): UpgradePlan {
	const fates = new Map<MapName, MapFate>();
	const obstacles: string[] = [];
	for (const name of MAP_NAMES) {
		const from = older.specs.get(name);
		const difference = from && (findMapDifference(name, from, older.schema, newer.specs.get(name)!, newer.schema) ?? (changed.has(name) ? 'a migration' : undefined));
		if (!from || name === 'build') {
			fates.set(name, 'make');
		} else if (difference === undefined) {
			fates.set(name, 'keep');
		} else if (WRITTEN_BY_AGENT.includes(name)) {
			fates.set(name, 'copy');
		} else if (TALLIES.includes(name)) {
			fates.set(name, 'count');
		} else if (name in RECORDS) {
			fates.set(name, 'make');
		} else {
			obstacles.push(`map ${name}, which the programs of both share, differs: ${difference}`);
		}
	}

	return {fates, obstacles};
}

function findMapDifference(name: MapName, from: MapSpec, fromSchema: Schema, to: MapSpec, toSchema: Schema): string | undefined {
	for (const fact of ['type', 'flags', 'keySize', 'valueSize'] as const) {
		if (from[fact] !== to[fact]) {
			return `${fact} was ${from[fact]}, and is ${to[fact]}`;
		}
	}

	const record = RECORDS[name];
	if (record !== undefined) {
		return findDifference(fromSchema.btf, fromSchema.btf.struct(record), toSchema.btf, toSchema.btf.struct(record), record);
	}

	const [a, b] = [fromSchema, toSchema].map(({btf}) => btf.maps().get(name)!);
	return findDifference(fromSchema.btf, a!.key, toSchema.btf, b!.key, 'key') ?? findDifference(fromSchema.btf, a!.value, toSchema.btf, b!.value);
}
