/** From the pins of one layout to those of the next, by the loader alone. The layouts after this build's own are the tests' (test/fixtures/layouts.cmake). */
import {existsSync, readdirSync, renameSync, unlinkSync} from 'node:fs';
import {fileURLToPath} from 'node:url';
import test, {type ExecutionContext} from 'ava';
import {CGROUP_PROGRAMS, PROGRAMS, openDatapath, unload, type Datapath} from '../../src/loader/datapath.js';
import {takeWriterLock} from '../../src/loader/lock.js';
import {addUp} from '../../src/loader/migrations.js';
import {PinLayout} from '../../src/loader/paths.js';
import {MAP_NAMES, UNWALKABLE, type MapName, type PodValue} from '../../src/maps/schema.js';
import {native} from '../../src/native.js';
import {OBJECTS, TEST_MIGRATIONS, attached, start} from '../helpers/layouts.js';
import {run} from '../helpers/process.js';
import {World, type Pod} from '../helpers/world.js';

const CHILD = fileURLToPath(new URL('../helpers/dying-loader.js', import.meta.url));
const NETNS = [4711n, 4712n];

/** Something in every map that can be written to from here, and two pods whose inbound traffic is steered. */
function fill(datapath: Datapath, pods: readonly Pod[] = []): void {
	const {maps, schema} = datapath;
	const target = {address: '10.0.0.2', source: '10.0.0.2', port: 15_001, inPod: 1, spread: 1};
	const pod: PodValue = {
		policy: 3, flags: 128, exemptCgroupLevels: 0, markCount: 1, marks: [{value: 0x539, mask: 0xfff}, ...Array.from({length: 3}, () => ({value: 0, mask: 0}))],
		proxyUid: 1337, proxyGid: 0, inboundPort: 15_006, dnsPort: 15_053, target4: target, target6: {...target, address: 'fd00::2', source: 'fd00::2'},
	};
	const volume = {bytes: 7n, messages: 1n};
	const direction = {redirected: volume, passed: schema.tcpReasons.map(() => volume)};
	for (const [index, netns] of NETNS.entries()) {
		maps.pods.set(netns, {...pod, policy: 3 + index});
		maps.podInfo.set(netns, {name: `shop/${'x'.repeat(300)}${index}`, mode: 'ambient', address4: '10.0.0.2', address6: '', netnsDevice: 4n, netnsInode: netns, enrolledAtMs: 1n, namespaceChanges: 255});
		maps.counters.set(netns, {count: schema.reasons.map((_, reason) => BigInt(reason + 1))});
		maps.traffic.set(netns, {sentByClient: direction, sentByServer: direction});
		maps.prefixes.set({bits: 160, policy: 3 + index, address: '10.0.0.2'}, {flags: 1});
		maps.ports.set({policy: 3 + index, port: 8080}, {flags: 2});
		maps.exemptions.set({policy: 3 + index, kind: 'EXEMPT_UID', id: 1337n}, {present: 1});
		maps.exemptions.set({policy: 3 + index, kind: 'EXEMPT_INTERFACE', id: 2n}, {present: 1});
		maps.addresses.set({bits: 128, address: `10.0.0.${index}`}, netns);
	}

	const original = {address: '10.0.9.9', port: 80, inPod: 1, role: 'ROLE_PROXY', netns: NETNS[0]!, dnsPort: 0};
	maps.handshakes.set({netns: NETNS[0]!, client: '10.0.0.2', proxy: '10.0.0.2', clientPort: 40_000, proxyPort: 15_001}, original);
	maps.passes.set({client: '10.0.0.1', server: '10.0.0.2', clientPort: 1, serverPort: 2}, {reason: 'REASON_INBOUND_BYPASS_NODE'});
	maps.node.set(0, {netns: 1n, unknownAddresses: 5n, acceleration: 'ACCELERATION_AUTO'});
	for (const {netns} of pods) {
		const handle = native.openNetns(netns);
		datapath.steer(handle.cookie(), handle);
		handle.close();
	}
}

type Contents = Readonly<Record<string, unknown>>;

/** All that can be read, per-CPU values as their sums. */
function contentsOf({schema, rawMaps, maps}: Datapath): Contents {
	const named = (perCpu: readonly unknown[]) => perCpu.reduce(addUp);
	return Object.fromEntries(MAP_NAMES.filter(name => !UNWALKABLE.includes(name) && name !== 'build').map(name => {
		const entries = name === 'counters' || name === 'traffic'
			? maps[name].entriesPerCpu().map(([key, perCpu]) => [key, named(perCpu)])
			: schema.typed<unknown, unknown>(name, rawMaps.get(name)!).entries();
		return [name, entries.map(entry => JSON.stringify(entry, (_, value: unknown) => typeof value === 'bigint' ? `${value}n` : value)).sort()];
	}));
}

/** What the contents of layout 2 are in layout 3. */
function inLayout3(contents: Contents): Contents {
	const grown = (entries: unknown, pattern: RegExp, end: string) => (entries as string[]).map(entry => entry.replaceAll(pattern, end)).sort();
	return {
		...contents,
		counters: grown(contents['counters'], /"]}]$/g, '","0n"]}]'),
		traffic: grown(contents['traffic'], /}]}/g, '},{"bytes":"0n","messages":"0n"}]}'),
	};
}

const idsOf = ({rawMaps}: Datapath) => Object.fromEntries([...rawMaps].map(([name, map]) => [name, map.info().id]));

/** The programs of one hook; on each there is exactly one, and a pod's. */
function assertWhole(t: ExecutionContext, world: World, pods: readonly Pod[], message: string): void {
	t.deepEqual([...attached(world).values()].map(ids => ids.length), CGROUP_PROGRAMS.map(() => 1), message);
	const directories = readdirSync(`${world.bpffs}/sidestep`).filter(name => name.startsWith('v')).map(name => `${world.bpffs}/sidestep/${name}/pods`);
	const pins = directories.filter(directory => existsSync(directory)).flatMap(directory => readdirSync(directory).map(name => `${directory}/${name}`));
	t.is(pins.length, pods.length, message);
	for (const pin of pins) {
		const link = native.openPinnedLink(pin);
		t.true(link.info().targetId !== 0n && link.info().programId > 0, message);
		link.close();
	}
}

/** All is of this layout, and runs this layout's programs. */
function assertUpgraded(t: ExecutionContext, world: World, layout: number, pods: readonly Pod[], message = ''): void {
	t.deepEqual(readdirSync(`${world.bpffs}/sidestep`), [`v${layout}`], message);
	assertWhole(t, world, pods, message);
	const datapath = openDatapath(world.bpffs, OBJECTS[layout]);
	const running = [...attached(world).values()].flat().sort((a, b) => a - b);
	t.deepEqual(CGROUP_PROGRAMS.map(name => datapath.programs.get(name)!.info().id).sort((a, b) => a - b), running, message);
	t.is(datapath.steeredPods().length, pods.length, message);
	for (const cookie of datapath.steeredPods()) {
		const link = native.openPinnedLink(datapath.layout.podLink(cookie));
		t.is(link.info().programId, datapath.programs.get('inbound')!.info().id, message);
		link.close();
	}

	t.is(datapath.maps.build.get(0)!.layout, layout, message);
	datapath.close();
}

function unloadHere(world: World, layout: number): void {
	const lock = takeWriterLock(new PinLayout(world.bpffs, layout));
	try {
		unload(lock, undefined, OBJECTS[layout]);
	} finally {
		lock.release();
	}
}

test('one version on: entries are converted, what programs share stays the same kernel map, counts go on', t => {
	const world = World.create(t);
	const pods = [world.pod('a'), world.pod('b')];
	let before: Contents = {};
	let ids: Readonly<Record<string, number>> = {};
	start(world, 2, {look(datapath) {
		fill(datapath, pods);
		before = contentsOf(datapath);
		ids = idsOf(datapath);
	}});
	const steps: string[] = [];
	const links = new Set(CGROUP_PROGRAMS.map(name => native.openPinnedLink(`${world.bpffs}/sidestep/v2/links/${name}`).info().id));
	t.is(start(world, 3, {
		onStep(step) {
			steps.push(step);
			assertWhole(t, world, pods, step);
		},
		look(datapath) {
			t.deepEqual(contentsOf(datapath), inLayout3(before));
			const after = idsOf(datapath);
			t.deepEqual(MAP_NAMES.filter(name => after[name] !== ids[name]), ['pods', 'pod_info', 'counters', 'traffic', 'build']);
			t.deepEqual(new Set([...datapath.links.values()].map(link => link.info().id)), links, 'the links are the same, so no hook was ever without a program');
		},
	}), 'upgraded');
	assertUpgraded(t, world, 3, pods);
	t.log(steps.join(', '));
	t.is(start(world, 3), 'adopted');
});

test('several versions on: the migrations are chained, in one start or in several', t => {
	const contents = [[2, 4], [2, 3, 4]].map(layouts => {
		const world = World.create(t);
		let last: Contents = {};
		for (const layout of layouts) {
			start(world, layout, {look(datapath) {
				if (layout === 2) {
					fill(datapath);
				}

				last = contentsOf(datapath);
			}});
		}

		assertUpgraded(t, world, 4, []);
		return last;
	});
	t.deepEqual(contents[0], contents[1]);
	t.regex(JSON.stringify(contents[0]!['pods']), /testGeneration\\":1003/);
	// One was left out, of the other the key is another.
	t.deepEqual(contents[0]!['exemptions'], [3, 4].map(policy => JSON.stringify([{policy, kind: 'EXEMPT_UID', id: '1338n'}, {present: 1}])));
});

test('what old programs count while they are replaced is not lost', t => {
	const world = World.create(t);
	start(world, 2, {look: fill});
	const older = native.openPinnedMap(`${world.bpffs}/sidestep/v2/maps/counters`);
	const count = (map: typeof older, netns: bigint) => {
		const key = new Uint8Array(new BigUint64Array([netns]).buffer);
		const value = map.lookup(key)!;
		new DataView(value.buffer).setBigUint64(0, new DataView(value.buffer).getBigUint64(0, true) + 1n, true);
		map.update(key, value);
	};

	let counted = 0;
	start(world, 3, {
		onStep(step) {
			if (/ (filled|switched|moved)$/.test(step)) {
				counted++;
				count(older, NETNS[0]!);
			}

			// As new programs do, from when on there are some.
			if (step.endsWith(' moved')) {
				counted++;
				const newer = native.openPinnedMap(`${world.bpffs}/sidestep/v3/maps/counters`);
				count(newer, NETNS[0]!);
				newer.close();
			}
		},
		look({maps}) {
			const sum = maps.counters.getAll(NETNS[0]!)!.reduce((total, {count: counts}) => total + counts[0]!, 0n);
			t.is(sum, BigInt(native.possibleCpus() + counted));
			t.is(maps.counters.getAll(NETNS[1]!)!.reduce((total, {count: counts}) => total + counts[0]!, 0n), BigInt(native.possibleCpus()));
		},
	});
	t.true(counted > 2 * CGROUP_PROGRAMS.length);
	older.close();
});

test('a map that hooks speak to each other by cannot change: the upgrade is refused, and all stays as it is', t => {
	const world = World.create(t);
	const pods = [world.pod('a')];
	start(world, 2, {look: datapath => fill(datapath, pods)});
	const before = attached(world);
	const handles = native.openHandles();
	t.throws(() => start(world, 5), {message: /v2 cannot be upgraded to v5 \(map handshakes, which the programs of both share, differs: valueSize was 40, and is 48; map original_dsts/, code: 'ERR_MIGRATION'} as never);
	t.deepEqual(attached(world), before);
	t.is(native.openHandles(), handles);
	assertUpgraded(t, world, 2, pods);
});

for (const [title, migrations, message] of [
	['a migration is missing', TEST_MIGRATIONS.filter(({from}) => from !== 3), /this build cannot migrate layout v3/],
	['a migration forgets a field', TEST_MIGRATIONS.map(migration => migration.from === 3 ? {from: 3, maps: {}} : migration), /the entries of map pods do not fit: testGeneration: expected an integer, got undefined/],
	['a migration throws', TEST_MIGRATIONS.map(migration => migration.from === 3 ? {...migration, maps: {...migration.maps, ports() {
		throw new Error('no such port');
	}}} : migration), /the entries of map ports do not fit: no such port/],
] as const) {
	test(`${title}: the upgrade is refused, and all stays as it is`, t => {
		const world = World.create(t);
		start(world, 2, {look: datapath => fill(datapath)});
		const before = attached(world);
		const handles = native.openHandles();
		t.throws(() => start(world, 4, {migrations}), {message});
		t.deepEqual(attached(world), before);
		t.is(native.openHandles(), handles);
		assertUpgraded(t, world, 2, []);
	});
}

test('a copy is never smaller than what it was made from, and larger when asked for', t => {
	const capacities = ({rawMaps}: Datapath) => (['pods', 'pod_info', 'counters', 'ports'] satisfies MapName[]).map(name => rawMaps.get(name)!.info().maxEntries);
	const world = World.create(t);
	const asked = (entries: number) => ({pods: entries, pod_info: entries, counters: entries});
	start(world, 2, {maxEntries: asked(64), look: datapath => t.deepEqual(capacities(datapath), [64, 64, 64, 262_144])});
	// The same version: what is there is kept.
	t.is(start(world, 2, {maxEntries: asked(128), look: datapath => t.deepEqual(capacities(datapath), [64, 64, 64, 262_144])}), 'adopted');
	start(world, 3, {maxEntries: asked(8), look: datapath => t.deepEqual(capacities(datapath), [64, 64, 64, 262_144])});
	start(world, 4, {maxEntries: asked(128), look: datapath => t.deepEqual(capacities(datapath), [128, 64, 64, 262_144], 'only pods changed')});
});

test('there is no way back: an older version is refused with the reason, changes nothing, and the newer one goes on', t => {
	const world = World.create(t);
	start(world, 3);
	const before = attached(world);
	t.throws(() => start(world, 2), {message: /holds layout v3 of sidestep .*, and this is layout v2 of sidestep .*: there is no way back, as .*; go on with that version, or run its `sidestep unload` first/});
	for (const command of [['status'], ['pods'], ['map', 'list'], ['acceleration', 'off'], ['unload']]) {
		const {code, stderr} = world.sidestep(...command);
		t.is(code, 1);
		t.regex(stderr, /holds layout v3 of sidestep/);
	}

	t.deepEqual(attached(world), before);
	assertUpgraded(t, world, 3, []);
	unloadHere(world, 3);
	t.is(start(world, 2), 'loaded');
});

test('a newer version\'s commands leave an older one\'s pins alone, and say what to do', t => {
	const world = World.create(t);
	start(world, 2);
	t.throws(() => openDatapath(world.bpffs, OBJECTS[3]), {message: /holds layout v2 of sidestep .*, and this is layout v3 of sidestep .*: use that version's commands, or start `sidestep run` of this one, which upgrades without a gap/});
	t.throws(() => unloadHere(world, 3), {message: /holds layout v2/});
	assertUpgraded(t, world, 2, []);
});

test('only one writer, whichever version it is', t => {
	const world = World.create(t);
	const lock = takeWriterLock(new PinLayout(world.bpffs, 2));
	t.throws(() => start(world, 3), {message: /another sidestep writes to .*: stop that agent first/});
	lock.release();
	t.is(start(world, 3), 'loaded');
});

test('programs that are new to a version are attached, those that are no more are detached, and those whose cgroup was removed come back', t => {
	const world = World.create(t);
	const cgroup = world.subCgroup('inner');
	start(world, 2, {cgroup});
	const links = `${world.bpffs}/sidestep/v2/links`;
	// As if layout 2 had not had the one, and had had another.
	unlinkSync(`${links}/recvmsg4`);
	renameSync(`${links}/bind6`, `${links}/bind7`);
	start(world, 3, {cgroup, look({links: after}) {
		t.is(after.size, CGROUP_PROGRAMS.length);
	}});
	t.deepEqual([...attached({...world, cgroup} as World).values()].map(ids => ids.length), CGROUP_PROGRAMS.map(() => 1));
	t.deepEqual(readdirSync(`${world.bpffs}/sidestep`), ['v3']);
});

test('links to another cgroup than the one that was asked for are no upgrade\'s to move', t => {
	const world = World.create(t);
	const cgroup = world.subCgroup('inner');
	start(world, 2, {cgroup});
	t.throws(() => start(world, 3), {message: /is attached to another cgroup/});
	t.deepEqual(readdirSync(`${world.bpffs}/sidestep`), ['v2']);
});

test('a pin that somebody removed from the older layout is named, and not taken for an empty map', t => {
	const world = World.create(t);
	start(world, 2, {look: fill});
	unlinkSync(`${world.bpffs}/sidestep/v2/maps/ports`);
	t.throws(() => start(world, 3), {message: /v2 lacks maps\/ports/});
	t.deepEqual(readdirSync(`${world.bpffs}/sidestep`), ['v2']);
});

/** @returns the step that a process died at. */
function dieAt(world: World, layout: number, step: number): string | undefined {
	const {code, stdout, stderr} = run(process.execPath, [CHILD, 'load', world.bpffs, world.cgroup, String(step), OBJECTS[layout]!]);
	if (code !== null && code !== 0) {
		throw new Error(`the child failed by itself: ${stderr}`);
	}

	return code === 0 ? undefined : stdout.trim().split('\n').at(-1);
}

test('an upgrade that dies before it takes effect: the old version goes on as before, the new one begins again', t => {
	t.timeout(150_000);
	const world = World.create(t);
	const pods = [world.pod('a')];
	const died: string[] = [];
	let before: Contents = {};
	start(world, 2, {look(datapath) {
		fill(datapath, pods);
		before = contentsOf(datapath);
	}});
	const running = attached(world);
	for (let step = 1; died.at(-1) !== 'renamed'; step++) {
		died.push(dieAt(world, 3, step)!);
		if (died.at(-1) !== 'renamed') {
			t.deepEqual(attached(world), running, died.at(-1));
			t.is(start(world, 2, {look: datapath => t.deepEqual(contentsOf(datapath), before)}), 'adopted', died.at(-1));
			assertUpgraded(t, world, 2, pods, died.at(-1));
		}
	}

	t.deepEqual(died, ['loaded', 'maps pinned', 'programs pinned', 'pods filled', 'pod_info filled', 'counters filled', 'traffic filled', 'renamed']);
	t.deepEqual(attached(world), running, 'up to here nothing of the new version ran');
	t.throws(() => start(world, 2), {message: /holds layout v3 .*there is no way back/});
	t.is(start(world, 3, {look: datapath => t.deepEqual(contentsOf(datapath), inLayout3(before))}), 'upgraded');
	assertUpgraded(t, world, 3, pods);
});

class Death extends Error {}

/**
Starts that version again and again; each start dies at its first step that none has died at (behind the rename a death leaves exactly what an exception leaves: nothing is undone).

@returns the steps died at.
*/
function dieAtEach(world: World, layout: number, look: (step: string) => void): string[] {
	const died: string[] = [];
	for (;;) {
		try {
			start(world, layout, {onStep(step) {
				if (!died.includes(step)) {
					died.push(step);
					throw new Death();
				}
			}});
			return died;
		} catch (error) {
			if (!(error instanceof Death)) {
				throw error;
			}

			look(died.at(-1)!);
		}
	}
}

test('an upgrade that dies at any step after it took effect is finished by the next start of the new version, which may die too; no hook ever lacks a program', t => {
	t.timeout(150_000);
	const world = World.create(t);
	const pods = [world.pod('a'), world.pod('b')];
	let before: Contents = {};
	start(world, 2, {look(datapath) {
		fill(datapath, pods);
		before = contentsOf(datapath);
	}});
	const precommit = 8;
	t.is(dieAt(world, 3, precommit), 'renamed');
	const died = dieAtEach(world, 3, step => {
		assertWhole(t, world, pods, step);
		t.throws(() => start(world, 2), {message: /there is no way back/}, step);
		if (existsSync(`${world.bpffs}/sidestep/v2`)) {
			t.throws(() => openDatapath(world.bpffs, OBJECTS[3]), {message: /in the middle of an upgrade from layout v2 to v3: start `sidestep run`, which finishes it/}, step);
		}
	});
	t.true(died.length > 2 * CGROUP_PROGRAMS.length + PROGRAMS.length + MAP_NAMES.length);
	assertUpgraded(t, world, 3, pods);
	start(world, 3, {look: datapath => t.deepEqual(contentsOf(datapath), inLayout3(before))});
});

test('killed before, in the middle of or after the switch, the next start finishes; and so does a start of a still newer version', t => {
	t.timeout(150_000);
	for (const [step, next] of [[2, 4], [6, 3], [9, 3], [15, 3], [25, 4], [40, 4], [60, 3]] as const) {
		const world = World.create(t);
		const pods = [world.pod('a')];
		start(world, 2, {look: datapath => fill(datapath, pods)});
		const name = dieAt(world, 3, step);
		t.truthy(name);
		assertWhole(t, world, pods, name!);
		t.is(start(world, next, {look({maps}) {
			t.is(maps.counters.getAll(NETNS[0]!)!.reduce((total, {count}) => total + count[4]!, 0n), BigInt(5 * native.possibleCpus()), name);
		}}), 'upgraded', name);
		assertUpgraded(t, world, next, pods, name);
	}
});

test('an unload after an interrupted upgrade takes both versions away', t => {
	const world = World.create(t);
	const pods = [world.pod('a')];
	start(world, 2, {look: datapath => fill(datapath, pods)});
	t.truthy(dieAt(world, 3, 15));
	const {code, stdout, stderr} = run(process.execPath, [CHILD, 'unload', world.bpffs, world.cgroup, '0', OBJECTS[3]!]);
	t.is(code, 0, stderr + stdout);
	t.deepEqual(readdirSync(`${world.bpffs}/sidestep`), []);
	t.true([...attached(world).values()].every(ids => ids.length === 0));
});
