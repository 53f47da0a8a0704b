/**
From the pins of an older layout to those of this one, while connections come and go.

	stage/     maps and programs of the new layout; nothing runs them yet, the older layout's programs go on
	rename     stage/ → v3/: from here on there is no way back, and every start goes forward
	links      one by one: the program is replaced in the running link, then the link's pin moves from v2/ to v3/
	counts     that the old programs still made are added to the new ones
	v2/        goes

Each link is pinned in one place at any time, which tells whether it was switched. All after the rename can be done again, from whatever was left.
*/
import {existsSync, readdirSync, renameSync} from 'node:fs';
import path from 'node:path';
import {AgentError, IncompletePinsError, MigrationError, OtherCgroupError, reasonOf} from '../errors.js';
import {createCodec} from '../maps/codec.js';
import {PerCpuMap} from '../maps/map.js';
import {Schema, TALLIES, type BuildRecord, type MapName, type NetnsCookie} from '../maps/schema.js';
import {native, type BpfMap} from '../native.js';
import {MIGRATIONS, addUp, chainMigrations, type Chain, type Decoded, type Migration} from './migrations.js';
import type {OpenedObject} from './object.js';
import type {PinLayout} from './paths.js';
import {CGROUP_PROGRAMS, Datapath, attachToMap, loadObject, open, pinToStage, pinnedVersions, podLinks, removeTree, switchLink, writeBuild} from './pinned.js';
import {planUpgrade, type UpgradePlan} from './upgrade-plan.js';

export interface UpgradeOptions {
	/** cgroup v2 directory that the programs are attached to. */
	readonly cgroup: string;
	readonly maxEntries?: Readonly<Partial<Record<MapName, number>>>;
	readonly migrations?: readonly Migration[];
}

/** What an older layout left, opened as it describes itself. */
interface Older {
	readonly layout: PinLayout;
	readonly schema: Schema;
	readonly maps: ReadonlyMap<string, BpfMap>;
	close(): void;
}

/**
Up to the point of no return, and beyond: {@link finishUpgrade}. A crash or a failure before it changes nothing.

@throws MigrationError, IncompletePinsError, OtherCgroupError, MapFullError, LoadError
*/
export function upgrade(layout: PinLayout, opened: OpenedObject, options: UpgradeOptions, step: (step: string) => void): void {
	requireCgroup(layout, options.cgroup);
	const older = openOlder(layout, olderVersions(layout)[0]!);
	let datapath: Datapath | undefined;
	try {
		const chain = chainMigrations(options.migrations ?? MIGRATIONS, older.layout.version, layout.version);
		const {fates} = planMaps(older, opened, chain);
		const specs = new Map(opened.object.maps().map(spec => [spec.name, spec]));
		for (const [name, fate] of fates) {
			const from = older.maps.get(name);
			const capacity = from?.info().maxEntries ?? 0;
			// Never smaller than what the entries come from. Socket storages have none.
			const entries = fate === 'keep' ? capacity : Math.max(capacity, options.maxEntries?.[name] ?? specs.get(name)!.maxEntries);
			if (entries > 0) {
				opened.object.setMaxEntries(name, entries);
			}

			if (fate === 'keep') {
				opened.object.reuseMap(name, from!);
			}
		}

		loadObject(opened.object);
		step('loaded');
		removeTree(layout.stage, step);
		datapath = open(opened.schema, layout, name => opened.object.map(name), name => opened.object.program(name), () => undefined);
		pinToStage(datapath, step);
		for (const [name, fate] of fates) {
			if (fate === 'copy' || fate === 'count') {
				fill(name, older, datapath, chain);
				step(`${name} filled`);
			}
		}

		writeBuild(datapath.maps, opened.schema, opened.sha256);
		renameSync(layout.stage, layout.current);
		step('renamed');
	} catch (error) {
		if (!existsSync(layout.current)) {
			removeTree(layout.stage, () => {});
		}

		throw error;
	} finally {
		datapath?.close();
		older.close();
	}
}

/**
Does what is left of an upgrade to this layout; nothing, if nothing is.

@param options - undefined before an unload: then nobody needs the counts, nor programs that the older layout did not have.
*/
export function finishUpgrade(layout: PinLayout, {object, schema}: OpenedObject, options: UpgradeOptions | undefined, step: (step: string) => void): void {
	const olderLayouts = olderVersions(layout).map(version => layout.of(version));
	if (olderLayouts.length === 0 || !existsSync(layout.current)) {
		return;
	}

	if (options) {
		requireCgroup(layout, options.cgroup);
	}

	const datapath = open(schema, layout, name => native.openPinnedMap(layout.map(name)), name => native.openPinnedProgram(layout.program(name)), () => undefined);
	try {
		attachToMap(datapath);
		step('map programs switched');
		for (const older of olderLayouts) {
			switchPods(older, datapath, step);
		}

		for (const name of CGROUP_PROGRAMS) {
			const program = datapath.programs.get(name)!;
			const pin = olderLayouts.map(older => older.link(name)).find(candidate => existsSync(candidate));
			if (pin !== undefined && switchLink(pin, program)) {
				step(`${name} switched`);
				renameSync(pin, layout.link(name));
				step(`${name} moved`);
			} else if (options && !existsSync(layout.link(name))) {
				const link = program.attachCgroup(options.cgroup, object.programs().find(spec => spec.name === name)!.attachType);
				try {
					link.pin(layout.link(name));
				} finally {
					link.close();
				}

				step(`${name} attached`);
			}
		}

		for (const older of olderLayouts) {
			if (options) {
				addCounts(older, datapath, chainMigrations(options.migrations ?? MIGRATIONS, older.version, layout.version), step);
			}

			// With the links of programs that are no more.
			removeTree(older.current, step);
		}
	} finally {
		datapath.close();
	}
}

function switchPods(older: PinLayout, {layout, programs}: Datapath, step: (step: string) => void): void {
	for (const cookie of podLinks(older.current)) {
		// One whose namespace is gone moves too; the next round takes it away.
		switchLink(older.podLink(cookie), programs.get('inbound')!);
		step(`pod ${cookie} switched`);
		renameSync(older.podLink(cookie), layout.podLink(cookie));
		step(`pod ${cookie} moved`);
	}
}

/** What the older layout's programs counted up to their end. Of a pod that dies with the agent between two lines below, the counts begin anew; none is counted twice. */
function addCounts(layout: PinLayout, datapath: Datapath, chain: Chain, step: (step: string) => void): void {
	const codec = datapath.schema.codec<{netns: NetnsCookie; counters: Decoded; traffic: Decoded}>('carried');
	const nothing = codec.decode(new Uint8Array(codec.size));
	native.waitForPrograms();
	for (const name of TALLIES.filter(tally => existsSync(layout.map(tally)))) {
		const from = native.openPinnedMap(layout.map(name));
		try {
			// A map that was kept is pinned in both.
			if (from.info().id === datapath.rawMaps.get(name)!.info().id) {
				continue;
			}

			const tallies = perCpu(name, from);
			for (const entry of sums(tallies)) {
				const converted = chain.convert(name, entry);
				tallies.delete(entry[0]);
				if (converted) {
					datapath.programs.get('add_counts')!.testRun({data: codec.encode({...nothing, netns: converted[0], [name]: converted[1]})});
				}

				step(`${name} of ${entry[0]} added`);
			}
		} finally {
			from.close();
		}
	}
}

/** As the map's own types describe it. */
function perCpu(name: MapName, map: BpfMap): PerCpuMap<NetnsCookie, Decoded> {
	const {btf} = schemaOf(map)!;
	const {key, value} = btf.maps().get(name)!;
	return new PerCpuMap(name, map, createCodec(btf, key), createCodec(btf, value));
}

/** Cookie → counts of all CPUs together. */
function sums(map: PerCpuMap<NetnsCookie, Decoded>): ReadonlyArray<readonly [NetnsCookie, Decoded]> {
	return map.entriesPerCpu().map(([cookie, values]) => [cookie, values.reduce(addUp)]);
}

function fill(name: MapName, {schema, maps, layout}: Older, datapath: Datapath, chain: Chain): void {
	const isTally = TALLIES.includes(name);
	const to = datapath.schema.typed<Decoded, Decoded>(name, datapath.rawMaps.get(name)!);
	try {
		if (isTally) {
			// The counts themselves come at the end; before it the old programs add to them.
			const zero = to.value.decode(new Uint8Array(to.value.size));
			const tallies = new PerCpuMap(name, to.raw, to.key, to.value);
			for (const entry of sums(perCpu(name, maps.get(name)!))) {
				const converted = chain.convert(name, entry);
				if (converted) {
					to.value.encode(converted[1]);
					tallies.set(converted[0], zero);
				}
			}
		} else {
			for (const entry of schema.typed<Decoded, Decoded>(name, maps.get(name)!).entries()) {
				const converted = chain.convert(name, entry);
				if (converted) {
					to.set(...converted);
				}
			}
		}
	} catch (error) {
		throw error instanceof AgentError ? error : new MigrationError(layout.version, datapath.layout.version, `the entries of map ${name} do not fit: ${reasonOf(error)}`, {cause: error});
	}
}

function planMaps(older: Older, opened: OpenedObject, chain: Chain): UpgradePlan {
	const plan = planUpgrade(
		{schema: older.schema, specs: new Map([...older.maps].map(([name, map]) => [name, map.info()]))},
		{schema: opened.schema, specs: new Map(opened.object.maps().map(spec => [spec.name, spec]))},
		chain.changed,
	);
	if (plan.obstacles.length > 0) {
		throw new MigrationError(chain.from, chain.to, plan.obstacles.join('; '));
	}

	return plan;
}

/** @throws IncompletePinsError when a map that the layout has is not pinned. */
function openOlder(ours: PinLayout, version: number): Older {
	const layout = ours.of(version);
	const directory = path.join(layout.current, 'maps');
	const names = existsSync(directory) ? readdirSync(directory) : [];
	const maps = new Map<string, BpfMap>();
	const close = () => {
		for (const map of maps.values()) {
			map.close();
		}
	};

	try {
		for (const name of names) {
			maps.set(name, native.openPinnedMap(layout.map(name)));
		}

		const build = maps.get('build');
		if (!build) {
			throw new IncompletePinsError(layout.current, ['maps/build']);
		}

		const schema = schemaOf(build);
		if (!schema) {
			throw new MigrationError(version, ours.version, 'the kernel keeps no types for its maps');
		}

		const missing = [...schema.btf.maps().keys()].filter(name => !maps.has(name));
		if (missing.length > 0) {
			throw new IncompletePinsError(layout.current, missing.map(name => `maps/${name}`));
		}

		return {layout, schema, maps, close};
	} catch (error) {
		close();
		throw error;
	}
}

/** @throws OtherCgroupError when a link of this or an older layout is attached elsewhere. */
function requireCgroup(layout: PinLayout, cgroup: string): void {
	const wanted = native.cgroupId(cgroup);
	for (const {current} of [layout, ...olderVersions(layout).map(version => layout.of(version))]) {
		const directory = path.join(current, 'links');
		for (const name of existsSync(directory) ? readdirSync(directory) : []) {
			const link = native.openPinnedLink(path.join(directory, name));
			const {targetId} = link.info();
			link.close();
			if (targetId !== 0n && targetId !== wanted) {
				throw new OtherCgroupError(path.join(directory, name), cgroup);
			}
		}
	}
}

/** Newest first. */
function olderVersions(layout: PinLayout): readonly number[] {
	return pinnedVersions(layout).filter(version => version < layout.version);
}

/** The schema of the object that made the map. */
function schemaOf(map: BpfMap): Schema | undefined {
	const types = map.btf();
	return types && new Schema(types);
}

/** `layout v3 of sidestep 0.2.0`, as far as it can be read. */
export function describePinned(layout: PinLayout): string {
	try {
		const map = native.openPinnedMap(layout.map('build'));
		try {
			const record = schemaOf(map)?.typed<number, BuildRecord>('build', map).get(0);
			return record ? describeBuild(layout.version, record.version) : describeBuild(layout.version);
		} finally {
			map.close();
		}
	} catch {
		return describeBuild(layout.version);
	}
}

export function describeBuild(layout: number, version?: string): string {
	return version === undefined ? `layout v${layout}` : `layout v${layout} of sidestep ${version}`;
}
