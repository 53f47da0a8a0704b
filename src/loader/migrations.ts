/**
How the entries of one layout become those of the next. Pure: entries in, entries out, as JavaScript values; what they were read and are written by comes from
the BTF of the pinned maps and of the object (upgrade.ts).
*/
import {MigrationError} from '../errors.js';
import {MAP_NAMES, type MapName} from '../maps/schema.js';

/** A key or value as its codec shows it. Layouts of the past have no TypeScript types. */
export type Decoded = any;
export type Entry = readonly [key: Decoded, value: Decoded];

export interface Migration {
	/** The layout it starts from; it ends at the next. */
	readonly from: number;
	/**
	By map: what becomes of an entry; undefined leaves it out. A map that is not named here keeps its entries; named, it is made anew even if its structs are the same.
	Per-CPU values are given as their sum.
	*/
	readonly maps: Readonly<Partial<Record<MapName, (key: Decoded, value: Decoded) => Entry | undefined>>>;
}

/** One for each bump of LAYOUT_VERSION since layout 2, the first that can be upgraded from. */
export const MIGRATIONS: readonly Migration[] = [];

/** Everything between two layouts, as one. */
export interface Chain {
	readonly from: number;
	readonly to: number;
	/** Maps that a migration names. */
	readonly changed: ReadonlySet<MapName>;
	convert(map: MapName, entry: Entry): Entry | undefined;
}

/** @throws MigrationError when there is no way. */
export function chainMigrations(migrations: readonly Migration[], from: number, to: number): Chain {
	const steps = Array.from({length: to - from}, (_, index) => migrations.find(migration => migration.from === from + index));
	const gap = steps.indexOf(undefined);
	if (gap !== -1) {
		throw new MigrationError(from, to, `this build cannot migrate layout v${from + gap}`);
	}

	const converters = (map: MapName) => steps.flatMap(step => step?.maps[map] ?? []);
	return {
		from,
		to,
		changed: new Set(MAP_NAMES.filter(map => converters(map).length > 0)),
		convert: (map, entry) => converters(map).reduce<Entry | undefined>((current, converter) => current && converter(...current), entry),
	};
}

/** Sums two values of a per-CPU map: all that is not a struct or an array in it is a count. */
export function addUp(a: Decoded, b: Decoded): Decoded {
	if (typeof a === 'bigint') {
		return a + b;
	}

	if (Array.isArray(a)) {
		return a.map((item, index) => addUp(item, b[index]));
	}

	return Object.fromEntries(Object.entries(a).map(([name, item]) => [name, addUp(item, b[name])]));
}
