/**
From the compiled object to running, pinned programs, and back.
*/
import {existsSync, mkdirSync, readdirSync, renameSync, rmdirSync, statSync, unlinkSync} from 'node:fs';
import path from 'node:path';
import {
	ForeignPinError, IncompletePinsError, LayoutVersionError, LoadError, MapIncompatibleError, NotLoadedError, OtherCgroupError,
} from '../errors.js';
import {MAP_NAMES, type MapName, type Maps, type NetnsCookie, type Schema} from '../maps/schema.js';
import {native, type BpfLink, type BpfMap, type BpfObject, type BpfProgram, type NetNs} from '../native.js';
import type {WriterLock} from './lock.js';
import {openObject, packageVersion, type OpenedObject} from './object.js';
import {PinLayout} from './paths.js';

/**
In the order they are attached. connect comes last and goes first: whatever it redirects needs all the others; with `pods` empty nothing is
redirected, so this only matters to a reader of a half-finished start.
*/
export const CGROUP_PROGRAMS = [
	'handshake', 'original_dst', 'getpeername4', 'getpeername6', 'recvmsg4', 'recvmsg6', 'bind4', 'bind6', 'sendmsg4', 'sendmsg6', 'connect4', 'connect6',
] as const;
export type CgroupProgramName = typeof CGROUP_PROGRAMS[number];

/** Attached to the map `accelerated`, as whose part they live; with their `enum bpf_attach_type`, which a pin does not tell. */
export const MAP_PROGRAMS = {move_bytes: 7, one_queue: 5} as const;
const MAP_PROGRAM_NAMES = Object.keys(MAP_PROGRAMS) as ReadonlyArray<keyof typeof MAP_PROGRAMS>;

/** `inbound` is attached to pods' namespaces, one by one; the last are attached nowhere, and run when somebody asks. */
export const PROGRAMS = [...CGROUP_PROGRAMS, ...MAP_PROGRAM_NAMES, 'inbound', 'find_listeners', 'sockets', 'pair', 'join', 'explain'] as const;
export type ProgramName = typeof PROGRAMS[number];

/** enum bpf_attach_type; a program that was opened from its pin does not know its own. */
const BPF_SK_LOOKUP = 36;

export interface LoadOptions {
	/** cgroup v2 directory to attach to. */
	readonly cgroup: string;
	/** Capacity of maps that are made anew; adopted ones keep theirs. */
	readonly maxEntries?: Readonly<Partial<Record<MapName, number>>>;
	/** A compiled object other than this build's. */
	readonly object?: string;
	/** Called after each step that changes the kernel; for progress, and for tests that die there. */
	readonly onStep?: (step: string) => void;
}

/** Open handles on what is pinned and running. */
export class Datapath {
	readonly maps: Maps;

	constructor(
		readonly layout: PinLayout,
		readonly schema: Schema,
		readonly rawMaps: ReadonlyMap<MapName, BpfMap>,
		readonly programs: ReadonlyMap<ProgramName, BpfProgram>,
		readonly links: ReadonlyMap<CgroupProgramName, BpfLink>,
	) {
		this.maps = schema.maps(name => rawMaps.get(name)!);
	}

	/** Pods whose inbound traffic is steered. */
	steeredPods(): readonly NetnsCookie[] {
		return podLinks(this.layout.current);
	}

	/** From now on what comes to the namespace is decided by the program `inbound`. */
	steer(cookie: NetnsCookie, netns: NetNs): void {
		const link = this.programs.get('inbound')!.attachNetns(netns.fd, BPF_SK_LOOKUP);
		try {
			mkdirSync(path.join(this.layout.current, 'pods'), {recursive: true, mode: 0o700});
			link.pin(this.layout.podLink(cookie));
		} catch (error) {
			link.detach();
			throw error;
		} finally {
			link.close();
		}
	}

	/** Also for a namespace that is gone. */
	unsteer(cookie: NetnsCookie): void {
		detach(this.layout.podLink(cookie));
		removePin(this.layout.podLink(cookie), () => {});
	}

	/** Closes the handles; what is pinned goes on. */
	close(): void {
		for (const handle of [...this.links.values(), ...this.programs.values(), ...this.rawMaps.values()]) {
			handle.close();
		}
	}
}

/**
Loads, attaches and pins; adopts what an earlier start has pinned; switches to this build's programs if those were another build's of the same
layout. A start that died at any step is repaired.

@throws LayoutVersionError, ForeignPinError, IncompletePinsError, MapIncompatibleError, OtherCgroupError, LoadError: nothing is changed then.
*/
export function load(lock: WriterLock, options: LoadOptions): {readonly datapath: Datapath; readonly how: 'loaded' | 'adopted' | 'replaced'} {
	const opened = openObject(options.object);
	const {layout} = lock;
	const step = options.onStep ?? (() => {});
	try {
		checkBase(layout);
		if (existsSync(layout.current)) {
			return adopt(layout, opened, options, step);
		}

		removeTree(layout.stage, layout, step);
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
	checkBase(layout);
	if (!existsSync(layout.current)) {
		throw new NotLoadedError(layout.current);
	}

	return openPins(layout, opened.schema);
}

/**
Takes everything away. Connections that run go on; see ARCHITECTURE.md for what they show from then on.

@returns false when nothing was there.
*/
export function unload(lock: WriterLock, step: (step: string) => void = () => {}): boolean {
	const {layout} = lock;
	checkBase(layout);
	const leftover = existsSync(layout.stage);
	removeTree(layout.stage, layout, step);
	const present = existsSync(layout.current);
	if (present) {
		checkContents(layout.current);
		renameSync(layout.current, layout.stage);
		step('renamed');
		removeTree(layout.stage, layout, step);
	}

	return present || leftover;
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
		for (const directory of ['maps', 'progs', 'links', 'pods']) {
			mkdirSync(path.join(layout.stage, directory), {recursive: true, mode: 0o700});
		}

		for (const [name, map] of datapath.rawMaps) {
			map.pin(layout.map(name, layout.stage));
		}

		step('maps pinned');
		for (const [name, program] of datapath.programs) {
			program.pin(layout.program(name, layout.stage));
		}

		step('programs pinned');
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
		removeTree(layout.stage, layout, () => {});
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
			removeTree(layout.stage, layout, step);
			return {datapath, how: 'adopted' as const};
		}

		for (const [name, map] of datapath.rawMaps) {
			opened.object.setMaxEntries(name, Math.max(1, map.info().maxEntries));
			opened.object.reuseMap(name, map);
		}

		loadObject(opened.object);
		step('loaded');
		removeTree(layout.stage, layout, step);
		mkdirSync(path.join(layout.stage, 'progs'), {recursive: true, mode: 0o700});
		mkdirSync(path.join(layout.stage, 'links'), {mode: 0o700});
		const programs = new Map<ProgramName, BpfProgram>();
		const links = new Map(datapath.links);
		for (const [name, old] of datapath.programs) {
			old.close();
			const program = opened.object.program(name);
			programs.set(name, program);
			if (name === 'inbound') {
				switchPods(layout, program);
			} else if (name === 'move_bytes' || name === 'one_queue') {
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
		removeTree(layout.stage, layout, step);
		return {datapath: new Datapath(layout, opened.schema, datapath.rawMaps, programs, links), how: 'replaced' as const};
	} catch (error) {
		datapath.close();
		throw error;
	}
}

function isCgroupProgram(name: ProgramName): name is CgroupProgramName {
	return (CGROUP_PROGRAMS as readonly ProgramName[]).includes(name);
}

/** Not by a link, which kernels before 6.10 do not have: they stay with the map, and a newer program takes the place of an older. */
function attachToMap({programs, rawMaps}: Datapath): void {
	for (const name of MAP_PROGRAM_NAMES) {
		programs.get(name)!.attachMapLegacy(rawMaps.get('accelerated')!, MAP_PROGRAMS[name]);
	}
}

function podLinks(root: string): readonly NetnsCookie[] {
	const directory = path.join(root, 'pods');
	return existsSync(directory) ? readdirSync(directory).map(BigInt) : [];
}

function switchPods(layout: PinLayout, program: BpfProgram): void {
	for (const cookie of podLinks(layout.current)) {
		const link = native.openPinnedLink(layout.podLink(cookie));
		try {
			// The link of a namespace that is gone cannot be updated; the next round takes it away.
			if (link.info().targetId !== 0n) {
				link.update(program);
			}
		} finally {
			link.close();
		}
	}
}

function loadObject(object: BpfObject): void {
	try {
		object.load();
	} catch (error) {
		throw new LoadError('sidestep.bpf.o', error);
	}
}

function writeBuild(maps: Maps, schema: Schema, objectSha256: string): void {
	maps.build.set(0, {layout: schema.layoutVersion, version: packageVersion(), objectSha256});
}

function openPins(layout: PinLayout, schema: Schema): Datapath {
	checkContents(layout.current);
	const missing = [
		...MAP_NAMES.map(name => ({path: layout.map(name), name: `maps/${name}`})),
		...PROGRAMS.map(name => ({path: layout.program(name), name: `progs/${name}`})),
		...CGROUP_PROGRAMS.map(name => ({path: layout.link(name), name: `links/${name}`})),
	].filter(pin => !existsSync(pin.path)).map(pin => pin.name);
	if (missing.length > 0) {
		throw new IncompletePinsError(layout.current, missing);
	}

	const datapath = open(
		schema,
		layout,
		name => native.openPinnedMap(layout.map(name)),
		name => native.openPinnedProgram(layout.program(name)),
		name => native.openPinnedLink(layout.link(name)),
	);
	for (const [name, map] of datapath.rawMaps) {
		const info = map.info();
		const {key, value} = schema.sizes(name);
		const differences = [
			...(info.keySize === key ? [] : [`key of ${info.keySize} bytes, not ${key}`]),
			...(info.valueSize === value ? [] : [`value of ${info.valueSize} bytes, not ${value}`]),
		];
		if (differences.length > 0) {
			datapath.close();
			throw new MapIncompatibleError(layout.map(name), differences);
		}
	}

	return datapath;
}

/** Opens all, or throws with nothing open. */
function open(
	schema: Schema,
	layout: PinLayout,
	openMap: (name: MapName) => BpfMap,
	openProgram: (name: ProgramName) => BpfProgram,
	openLink: (name: CgroupProgramName) => BpfLink | undefined,
): Datapath {
	const opened: Array<{close(): void}> = [];
	const keep = <T extends {close(): void}>(handle: T): T => {
		opened.push(handle);
		return handle;
	};

	try {
		const maps = new Map(MAP_NAMES.map(name => [name, keep(openMap(name))]));
		const programs = new Map(PROGRAMS.map(name => [name, keep(openProgram(name))]));
		const links = new Map<CgroupProgramName, BpfLink>();
		for (const name of CGROUP_PROGRAMS) {
			const link = openLink(name);
			if (link) {
				links.set(name, keep(link));
			}
		}

		return new Datapath(layout, schema, maps, programs, links);
	} catch (error) {
		for (const handle of opened) {
			handle.close();
		}

		throw error;
	}
}

/** Only what we make may be there; a layout of another version is its own maker's to remove. */
function checkBase(layout: PinLayout): void {
	if (!existsSync(layout.base)) {
		return;
	}

	for (const name of readdirSync(layout.base)) {
		const full = path.join(layout.base, name);
		if (full === layout.stage || full === layout.current) {
			continue;
		}

		if (/^v\d+$/.test(name)) {
			throw new LayoutVersionError(layout.base, name, layout.version);
		}

		throw new ForeignPinError(layout.base, `it holds ${name}`);
	}
}

function checkContents(directory: string): void {
	const known: Readonly<Record<string, (pin: string) => boolean>> = {
		maps: pin => MAP_NAMES.includes(pin as MapName),
		progs: pin => PROGRAMS.includes(pin as ProgramName),
		links: pin => CGROUP_PROGRAMS.includes(pin as CgroupProgramName),
		pods: pin => /^\d+$/.test(pin),
	};
	for (const name of readdirSync(directory)) {
		const isKnown = known[name];
		if (!isKnown || !statSync(path.join(directory, name)).isDirectory()) {
			throw new ForeignPinError(directory, `it holds ${name}`);
		}

		const stranger = readdirSync(path.join(directory, name)).find(pin => !isKnown(pin));
		if (stranger !== undefined) {
			throw new ForeignPinError(directory, `it holds ${name}/${stranger}`);
		}
	}
}

/** Removes a stage. Links first: those of the pods, then the connect programs' before the others'. */
function removeTree(stage: string, layout: PinLayout, step: (step: string) => void): void {
	if (!existsSync(stage)) {
		return;
	}

	checkContents(stage);
	for (const cookie of podLinks(stage)) {
		detach(layout.podLink(cookie, stage));
		removePin(layout.podLink(cookie, stage), step);
	}

	for (const name of [...CGROUP_PROGRAMS].reverse()) {
		detach(layout.link(name, stage));
		removePin(layout.link(name, stage), step);
	}

	for (const name of PROGRAMS) {
		removePin(layout.program(name, stage), step);
	}

	for (const name of MAP_NAMES) {
		removePin(layout.map(name, stage), step);
	}

	for (const directory of [...readdirSync(stage).map(name => path.join(stage, name)), stage]) {
		rmdirSync(directory);
	}
}

/** Now: the end of a link's last reference only schedules it (bpf_link_put), and whoever unloads wants to rely on it. */
function detach(pin: string): void {
	if (existsSync(pin)) {
		const link = native.openPinnedLink(pin);
		link.detach();
		link.close();
	}
}

function removePin(pin: string, step: (step: string) => void): void {
	if (existsSync(pin)) {
		unlinkSync(pin);
		step(`removed ${path.basename(path.dirname(pin))}/${path.basename(pin)}`);
	}
}
