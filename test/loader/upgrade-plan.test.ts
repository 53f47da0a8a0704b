import test from 'ava';
import {MIGRATIONS, addUp, chainMigrations} from '../../src/loader/migrations.js';
import {planUpgrade, type LayoutOfMaps} from '../../src/loader/upgrade-plan.js';
import type {BtfType} from '../../src/maps/btf.js';
import {findDifference} from '../../src/maps/compare.js';
import {MAP_NAMES, Schema} from '../../src/maps/schema.js';
import {native} from '../../src/native.js';
import {OBJECTS, TEST_MIGRATIONS} from '../helpers/layouts.js';

function layoutOf(layout: number): LayoutOfMaps {
	const object = native.openObject(OBJECTS[layout]!);
	try {
		return {schema: new Schema(object.btf()), specs: new Map(object.maps().map(spec => [spec.name, spec]))};
	} finally {
		object.close();
	}
}

const [two, three, four, five] = [2, 3, 4, 5].map(layoutOf) as [LayoutOfMaps, LayoutOfMaps, LayoutOfMaps, LayoutOfMaps];
const none = new Set<never>();
const fatesOf = (from: LayoutOfMaps, to: LayoutOfMaps, changed: Parameters<typeof planUpgrade>[2] = none) => Object.fromEntries([...planUpgrade(from, to, changed).fates].filter(([, fate]) => fate !== 'keep'));
const without = (layout: LayoutOfMaps, name: string): LayoutOfMaps => ({...layout, specs: new Map([...layout.specs].filter(([other]) => other !== name))});

test('maps whose types are the same are kept, but the one that tells the layout', t => {
	t.deepEqual(fatesOf(two, two), {build: 'make'});
	t.deepEqual([...planUpgrade(two, two, none).fates.keys()], [...MAP_NAMES]);
});

test('what only the agent writes is copied, counts are added up later', t => {
	t.deepEqual(fatesOf(two, three), {pods: 'copy', pod_info: 'copy', counters: 'count', traffic: 'count', build: 'make'});
	t.deepEqual(fatesOf(three, four), {pods: 'copy', build: 'make'});
});

test('a map that a migration names is made anew although its types are the same', t => {
	t.deepEqual(fatesOf(two, two, new Set(['ports', 'node'] as const)), {ports: 'copy', node: 'copy', build: 'make'});
	t.regex(planUpgrade(two, two, new Set(['passes'] as const)).obstacles.join('\n'), /map passes, which the programs of both share, differs: a migration/);
});

test('a map that is new is made; one that is no more is nobody\'s', t => {
	t.deepEqual(fatesOf(without(two, 'client_ports'), two), {client_ports: 'make', build: 'make'});
	t.deepEqual(fatesOf({...two, specs: new Map([...two.specs, ['gone', two.specs.get('ports')!]])}, two), {build: 'make'});
});

test('what programs hand to each other cannot change: neither in its structs, nor in its kind', t => {
	t.deepEqual(planUpgrade(three, five, none).obstacles.map(text => text.split(',')[0]), ['map handshakes', 'map original_dsts']);
	const lru = {...two, specs: new Map([...two.specs, ['passes', {...two.specs.get('passes')!, type: 9}]])};
	t.deepEqual(planUpgrade(two, lru, none).obstacles, ['map passes, which the programs of both share, differs: type was 1, and is 9']);
});

test('a migration for each layout up to this build\'s', t => {
	const {layoutVersion} = two.schema;
	t.deepEqual(MIGRATIONS.map(({from}) => from), Array.from({length: layoutVersion - 2}, (_, index) => index + 2));
});

test('migrations are chained in the order of layouts, and may leave an entry out on the way', t => {
	const chain = chainMigrations([
		{from: 3, maps: {ports: (key, value) => [key, value * 10]}},
		{from: 2, maps: {ports: (key, value) => value === 0 ? undefined : [key + 1, value + 1]}},
		{from: 4, maps: {pods: () => undefined}},
	], 2, 4);
	t.deepEqual(chain.convert('ports', [1, 1]), [2, 20]);
	t.is(chain.convert('ports', [1, 0]), undefined);
	t.deepEqual(chain.convert('pods', [1, 1]), [1, 1]);
	t.deepEqual(chain.changed, new Set(['ports'] as const));
	t.throws(() => chainMigrations(TEST_MIGRATIONS, 1, 4), {message: /layout v1 cannot be upgraded to v4 \(this build cannot migrate layout v1\)/});
	t.throws(() => chainMigrations(TEST_MIGRATIONS, 2, 7), {message: /cannot migrate layout v5/});
});

test('values of several CPUs are added up, however deep they are', t => {
	t.deepEqual([{a: [1n, {b: 2n}]}, {a: [10n, {b: 20n}]}, {a: [100n, {b: 200n}]}].reduce(addUp), {a: [111n, {b: 222n}]});
});

/** Types as BTF numbers them, 0 being void. */
function types(...list: BtfType[]) {
	const btf = new Schema(bytesOfTwo).btf;
	return Object.assign(Object.create(Object.getPrototypeOf(btf) as object) as typeof btf, {types: [{kind: 'other'}, ...list]});
}

const bytesOfTwo = (() => {
	const object = native.openObject(OBJECTS[2]!);
	try {
		return object.btf();
	} finally {
		object.close();
	}
})();
const u32: BtfType = {kind: 'int', name: 'unsigned int', size: 4, signed: false, char: false};

test('what keeps bytes of one type from being read as another is named', t => {
	const enumOf = (...values: ReadonlyArray<readonly [string, number]>) => types({kind: 'enum', name: 'reason', size: 4, values: new Map(values)});
	const structOf = (...members: ReadonlyArray<readonly [string, number]>) => types({kind: 'struct', name: 's', size: 8, members: members.map(([name, offset]) => ({name, type: 2, offset}))}, u32);
	const cases: ReadonlyArray<readonly [ReturnType<typeof types>, ReturnType<typeof types>, string | undefined]> = [
		[types(u32), types(u32), undefined],
		[types(u32), types({...u32, signed: true} as BtfType), 'value has another sign or byte order'],
		[types(u32), types({kind: 'typedef', name: '__u32', target: 2}, u32), undefined],
		[types(u32), types({kind: 'typedef', name: '__be32', target: 2}, u32), 'value has another sign or byte order'],
		[types(u32), types({...u32, size: 8} as BtfType), 'value had 4 bytes, and has 8'],
		[types(u32), enumOf(['A', 1]), 'value was a int, and is a enum'],
		[types({kind: 'array', element: 2, length: 2}, u32), types({kind: 'array', element: 2, length: 1}, {...u32, size: 8} as BtfType), 'value had 2 elements, and has 1'],
		[enumOf(['A', 0], ['REASONS', 1]), enumOf(['A', 0], ['B', 1], ['REASONS', 2]), undefined],
		[enumOf(['A', 0], ['B', 1]), enumOf(['B', 0], ['A', 1]), 'value: A was 0, and is 1'],
		[enumOf(['A', 0]), enumOf(['B', 0]), 'value: A was 0, and is gone'],
		[structOf(['a', 0], ['b', 4]), structOf(['a', 0], ['b', 4]), undefined],
		[structOf(['a', 0], ['b', 4]), structOf(['b', 0], ['a', 4]), 'value has other fields: b'],
		[structOf(['a', 0], ['b', 4]), structOf(['a', 0]), 'value has other fields: fewer'],
	];
	for (const [from, to, difference] of cases) {
		t.is(findDifference(from, 1, to, 1), difference);
	}
});
