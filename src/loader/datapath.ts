/**
From the compiled object to running, pinned programs, and back.
*/
import {existsSync, mkdirSync, readdirSync, renameSync} from 'node:fs';
import path from 'node:path';
import {ForeignPinError, LayoutVersionError, NotLoadedError, OtherCgroupError, UnfinishedUpgradeError} from '../errors.js';
import type {MapName} from '../maps/schema.js';
import {native, type BpfLink, type BpfProgram} from '../native.js';
import type {WriterLock} from './lock.js';
import type {Migration} from './migrations.js';
import {openObject, packageVersion, type OpenedObject} from './object.js';
import {PinLayout} from './paths.js';
import {
	CGROUP_PROGRAMS, Datapath, MAP_PROGRAMS, attachToMap, checkContents, fillSlot, isCgroupProgram, loadObject, open, openPins, pinToStage, pinnedVersions, podLinks, removeTree,
	switchLink, writeBuild, type CgroupProgramName, type ProgramName,
} from './pinned.js';
import {describeBuild, describePinned, finishUpgrade, upgrade} from './upgrade.js';

export {CGROUP_PROGRAMS, Datapath, MAP_PROGRAMS, PROGRAMS, type CgroupProgramName, type ProgramName} from './pinned.js';

export interface LoadOptions {
	/** cgroup v2 directory to attach to. */
	readonly cgroup: string;
	/** Capacity of maps that are made anew; adopted ones keep theirs. */
	readonly maxEntries?: Readonly<Partial<Record<MapName, number>>>;
	/** A compiled object other than this build's. */
	readonly object?: string;
	/** Instead of this build's. */
	readonly migrations?: readonly Migration[];
	/** Called after each step that changes the kernel; for progress, and for tests that die there. */
	readonly onStep?: (step: string) => void;
}

/**
Loads, attaches and pins; adopts what an earlier start has pinned; switches to this build's programs if those were another build's of the same
layout; upgrades an older layout. A start that died at any step is repaired.

@throws LayoutVersionError (the pins are of a newer layout), MigrationError, ForeignPinError, IncompletePinsError, MapIncompatibleError, OtherCgroupError, LoadError: nothing is changed then.
*/
export function load(lock: WriterLock, options: LoadOptions): {readonly datapath: Datapath; readonly how: 'loaded' | 'adopted' | 'replaced' | 'upgraded'} {
	const opened = openObject(options.object);
	const {layout} = lock;
	const step = options.onStep ?? (() => {});
	try {
		checkBase(layout, 'upgrade');
		const isUpgrade = pinnedVersions(layout).some(version => version < layout.version);
		if (isUpgrade && !existsSync(layout.current)) {
			upgrade(layout, opened, options, step);
		}

		finishUpgrade(layout, opened, options, step);
		if (existsSync(layout.current)) {
			const {datapath, how} = adopt(layout, opened, options, step);
			return {datapath, how: isUpgrade ? 'upgraded' : how};
		}

		removeTree(layout.stage, step);
		return {datapath: loadFresh(layout, opened, options, step), how: 'loaded'};
	} finally {
		opened.object.close();
	}
}

/** Opens what is pinned, for reading: no agent is needed. */
export function openDatapath(bpffs: string, object?: string): Datapath {
	const opened = openObject(object);
	opened.object.close();
	const layout = new PinLayout(bpffs, opened.schema.layoutVersion);
	checkBase(layout, 'use');
	const older = pinnedVersions(layout)[1];
	if (older !== undefined) {
		throw new UnfinishedUpgradeError(layout.base, older, layout.version);
	}

	if (!existsSync(layout.current)) {
		throw new NotLoadedError(layout.current);
	}

	return openPins(layout, opened.schema);
}

/**
Takes everything away. Connections that run go on; see ARCHITECTURE.md for what they show from then on.

@returns false when nothing was there.
*/
export function unload(lock: WriterLock, step: (step: string) => void = () => {}, object?: string): boolean {
	const {layout} = lock;
	finishInterrupted(lock, step, object);
	const leftover = existsSync(layout.stage);
	removeTree(layout.stage, step);
	const present = existsSync(layout.current);
	if (present) {
		checkContents(layout.current);
		renameSync(layout.current, layout.stage);
		step('renamed');
		removeTree(layout.stage, step);
	}

	return present || leftover;
}

/**
Finishes an upgrade that the agent died in, for whoever wants to unload.

@throws LayoutVersionError when the pins are another layout's.
*/
export function finishInterrupted({layout}: WriterLock, step: (step: string) => void = () => {}, object?: string): void {
	checkBase(layout, 'use');
	if (pinnedVersions(layout).length > 1) {
		const opened = openObject(object);
		opened.object.close();
		finishUpgrade(layout, opened, undefined, step);
	}
}

function loadFresh(layout: PinLayout, {object, schema, sha256}: OpenedObject, options: LoadOptions, step: (step: string) => void): Datapath {
	for (const [name, entries] of Object.entries(options.maxEntries ?? {})) {
		object.setMaxEntries(name, entries);
	}

	loadObject(object);
	step('loaded');
	const datapath = open(schema, layout, name => object.map(name), name => object.program(name), () => undefined);
	const links = new Map<CgroupProgramName, BpfLink>();
	try {
		pinToStage(datapath, step);
		writeBuild(datapath.maps, schema, sha256);
		attachToMap(datapath);
		for (const name of CGROUP_PROGRAMS) {
			const link = datapath.programs.get(name)!.attachCgroup(options.cgroup);
			links.set(name, link);
			step(`${name} attached`);
			link.pin(layout.link(name, layout.stage));
			step(`${name} pinned`);
		}

		renameSync(layout.stage, layout.current);
		step('renamed');
		return new Datapath(layout, schema, datapath.rawMaps, datapath.programs, links);
	} catch (error) {
		for (const link of links.values()) {
			link.close();
		}

		datapath.close();
		removeTree(layout.stage, () => {});
		throw error;
	}
}

function adopt(layout: PinLayout, opened: OpenedObject, options: LoadOptions, step: (step: string) => void) {
	const datapath = openPins(layout, opened.schema);
	try {
		const cgroup = native.cgroupId(options.cgroup);
		const gone: CgroupProgramName[] = [];
		for (const [name, link] of datapath.links) {
			const {targetId} = link.info();
			if (targetId === 0n) {
				gone.push(name);
			} else if (targetId !== cgroup) {
				throw new OtherCgroupError(layout.link(name), options.cgroup);
			}
		}

		const build = datapath.maps.build.get(0);
		if (build?.objectSha256 === opened.sha256 && gone.length === 0) {
			removeTree(layout.stage, step);
			return {datapath, how: 'adopted' as const};
		}

		for (const [name, map] of datapath.rawMaps) {
			opened.object.setMaxEntries(name, Math.max(1, map.info().maxEntries));
			opened.object.reuseMap(name, map);
		}

		loadObject(opened.object);
		step('loaded');
		removeTree(layout.stage, step);
		mkdirSync(path.join(layout.stage, 'progs'), {recursive: true, mode: 0o700});
		mkdirSync(path.join(layout.stage, 'links'), {mode: 0o700});
		const programs = new Map<ProgramName, BpfProgram>();
		const links = new Map(datapath.links);
		for (const [name, old] of datapath.programs) {
			old.close();
			const program = opened.object.program(name);
			programs.set(name, program);
			if (name === 'inbound') {
				for (const cookie of podLinks(layout.current)) {
					// The link of a namespace that is gone cannot be updated; the next round takes it away.
					switchLink(layout.podLink(cookie), program);
				}
			} else if (name === 'move_bytes') {
				fillSlot(datapath.rawMaps, program);
			} else if (name === 'message' || name === 'one_queue') {
				program.attachMapLegacy(datapath.rawMaps.get('accelerated')!, MAP_PROGRAMS[name]);
			} else if (isCgroupProgram(name) && gone.includes(name)) {
				// Its cgroup was removed, and the kernel detached it.
				links.get(name)!.close();
				const link = program.attachCgroup(options.cgroup);
				link.pin(layout.link(name, layout.stage));
				renameSync(layout.link(name, layout.stage), layout.link(name));
				links.set(name, link);
			} else if (isCgroupProgram(name)) {
				links.get(name)!.update(program);
			}

			// The link runs the new program while the pin still names the old one. If we die in between, `build` still names the old
			// object, and the next start does all of this again; traffic never lacks a program.
			step(`${name} switched`);
			program.pin(layout.program(name, layout.stage));
			renameSync(layout.program(name, layout.stage), layout.program(name));
			step(`${name} pinned`);
		}

		writeBuild(datapath.maps, opened.schema, opened.sha256);
		removeTree(layout.stage, step);
		return {datapath: new Datapath(layout, opened.schema, datapath.rawMaps, programs, links), how: 'replaced' as const};
	} catch (error) {
		datapath.close();
		throw error;
	}
}

/** Only what we make may be there: of another layout nothing, but what is to be upgraded. */
function checkBase(layout: PinLayout, purpose: 'use' | 'upgrade'): void {
	const names = existsSync(layout.base) ? readdirSync(layout.base) : [];
	const stranger = names.find(name => name !== path.basename(layout.stage) && !/^v\d+$/.test(name));
	if (stranger !== undefined) {
		throw new ForeignPinError(layout.base, `it holds ${stranger}`);
	}

	const [newest] = pinnedVersions(layout);
	if (newest !== undefined && (newest > layout.version || (newest < layout.version && purpose === 'use'))) {
		throw new LayoutVersionError(layout.base, describePinned(layout.of(newest)), describeBuild(layout.version, packageVersion()), newest > layout.version);
	}
}
