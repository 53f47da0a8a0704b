/**
What is pinned: which programs and maps there are, handles on them, and how a tree of pins is checked and taken away.
*/
import {existsSync, mkdirSync, readdirSync, rmdirSync, statSync, unlinkSync} from 'node:fs';
import path from 'node:path';
import {ForeignPinError, IncompletePinsError, LoadError, MapIncompatibleError} from '../errors.js';
import {MAP_NAMES, type MapName, type Maps, type NetnsCookie, type Schema} from '../maps/schema.js';
import {native, type BpfLink, type BpfMap, type BpfObject, type BpfProgram, type NetNs} from '../native.js';
import {packageVersion} from './object.js';
import type {PinLayout} from './paths.js';

/**
In the order they are attached. connect comes last and goes first: whatever it redirects needs all the others; with `pods` empty nothing is
redirected, so this only matters to a reader of a half-finished start.
*/
export const CGROUP_PROGRAMS = [
	'handshake', 'original_dst', 'getpeername4', 'getpeername6', 'recvmsg4', 'recvmsg6', 'bind4', 'bind6', 'sendmsg4', 'sendmsg6', 'connect4', 'connect6',
] as const;
export type CgroupProgramName = typeof CGROUP_PROGRAMS[number];

/** Attached to the map `accelerated`, as whose part they live; with their `enum bpf_attach_type`, which a pin does not tell. */
export const MAP_PROGRAMS = {message: 7, one_queue: 5} as const;
const MAP_PROGRAM_NAMES = Object.keys(MAP_PROGRAMS) as ReadonlyArray<keyof typeof MAP_PROGRAMS>;

/** `message` calls `move_bytes`; `inbound` is attached to pods' namespaces, one by one; the last are attached nowhere, and run when somebody asks. */
export const PROGRAMS = [...CGROUP_PROGRAMS, ...MAP_PROGRAM_NAMES, 'move_bytes', 'inbound', 'find_listeners', 'sockets', 'pair', 'join', 'explain', 'add_counts'] as const;
export type ProgramName = typeof PROGRAMS[number];

/** enum bpf_attach_type; a program that was opened from its pin does not know its own. */
const BPF_SK_LOOKUP = 36;

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

	/** Whether the pod's link does something: one that was detached, as by an agent that died in {@link unsteer}, stays pinned. */
	isSteered(cookie: NetnsCookie): boolean {
		const pin = this.layout.podLink(cookie);
		if (!existsSync(pin)) {
			return false;
		}

		const link = native.openPinnedLink(pin);
		try {
			return link.info().targetId !== 0n;
		} finally {
			link.close();
		}
	}

	/** From now on what comes to the namespace is decided by the program `inbound`. */
	steer(cookie: NetnsCookie, netns: NetNs): void {
		removePin(this.layout.podLink(cookie), () => {});
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

export function isCgroupProgram(name: ProgramName): name is CgroupProgramName {
	return (CGROUP_PROGRAMS as readonly ProgramName[]).includes(name);
}

/**
Attached not by a link, which kernels before 6.10 do not have: they stay with the map, and a newer program takes the place of an older, for sockets that come into the map
from then on. Those that are in it follow by the slot of `msg_programs`.
*/
export function attachToMap({programs, rawMaps}: Pick<Datapath, 'programs' | 'rawMaps'>): void {
	fillSlot(rawMaps, programs.get('move_bytes')!);
	for (const name of MAP_PROGRAM_NAMES) {
		programs.get(name)!.attachMapLegacy(rawMaps.get('accelerated')!, MAP_PROGRAMS[name]);
	}
}

/** From now on `message` runs this program, for every socket in `accelerated`. */
export function fillSlot(rawMaps: ReadonlyMap<MapName, BpfMap>, moveBytes: BpfProgram): void {
	rawMaps.get('msg_programs')!.update(new Uint8Array(4), new Uint8Array(Int32Array.of(moveBytes.fd).buffer));
}

/** Links of pods' namespaces below one root. */
export function podLinks(root: string): readonly NetnsCookie[] {
	const directory = path.join(root, 'pods');
	return existsSync(directory) ? readdirSync(directory).map(BigInt) : [];
}

/** @returns false when what it was attached to is gone: such a link cannot be updated. */
export function switchLink(pin: string, program: BpfProgram): boolean {
	const link = native.openPinnedLink(pin);
	try {
		if (link.info().targetId === 0n) {
			return false;
		}

		link.update(program);
		return true;
	} finally {
		link.close();
	}
}

export function loadObject(object: BpfObject): void {
	try {
		object.load();
	} catch (error) {
		throw new LoadError('sidestep.bpf.o', error);
	}
}

export function writeBuild(maps: Maps, schema: Schema, objectSha256: string): void {
	maps.build.set(0, {layout: schema.layoutVersion, version: packageVersion(), objectSha256});
}

export function openPins(layout: PinLayout, schema: Schema): Datapath {
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
export function open(
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

/** In a directory that this layout is in use from, nothing may be that it does not know. */
export function checkContents(directory: string): void {
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

/** Layouts that have a directory, newest first. */
export function pinnedVersions(layout: PinLayout): readonly number[] {
	const names = existsSync(layout.base) ? readdirSync(layout.base) : [];
	return names.flatMap(name => /^v(\d+)$/.exec(name)?.[1] ?? []).map(Number).sort((a, b) => b - a);
}

/**
Takes a tree of pins away, of whatever layout. Links first: those of the pods, then the connect programs' before the others'; those of programs that this build does
not know go before all.
*/
export function removeTree(root: string, step: (step: string) => void): void {
	if (!existsSync(root)) {
		return;
	}

	const directories = readdirSync(root);
	const stranger = directories.find(name => !DIRECTORIES.includes(name));
	if (stranger !== undefined) {
		throw new ForeignPinError(root, `it holds ${stranger}`);
	}

	for (const directory of DIRECTORIES.filter(name => directories.includes(name))) {
		const names = readdirSync(path.join(root, directory));
		for (const name of directory === 'links' ? names.sort((a, b) => rank(b) - rank(a)) : names) {
			const pin = path.join(root, directory, name);
			if (directory === 'pods' || directory === 'links') {
				detach(pin);
			}

			removePin(pin, step);
		}

		rmdirSync(path.join(root, directory));
	}

	rmdirSync(root);
}

function rank(link: string): number {
	const index = (CGROUP_PROGRAMS as readonly string[]).indexOf(link);
	return index === -1 ? CGROUP_PROGRAMS.length : index;
}

/** In the order in which they are emptied. */
const DIRECTORIES = ['pods', 'links', 'progs', 'maps'];

/** Now: the end of a link's last reference only schedules it (bpf_link_put), and whoever unloads wants to rely on it. */
export function detach(pin: string): void {
	if (existsSync(pin)) {
		const link = native.openPinnedLink(pin);
		link.detach();
		link.close();
	}
}

/** Pins maps and programs where a rename puts them in force; links come after. */
export function pinToStage({layout, rawMaps, programs}: Datapath, step: (step: string) => void): void {
	for (const directory of ['maps', 'progs', 'links', 'pods']) {
		mkdirSync(path.join(layout.stage, directory), {recursive: true, mode: 0o700});
	}

	for (const [name, map] of rawMaps) {
		map.pin(layout.map(name, layout.stage));
	}

	step('maps pinned');
	for (const [name, program] of programs) {
		program.pin(layout.program(name, layout.stage));
	}

	step('programs pinned');
}

export function removePin(pin: string, step: (step: string) => void): void {
	if (existsSync(pin)) {
		unlinkSync(pin);
		step(`removed ${path.basename(path.dirname(pin))}/${path.basename(pin)}`);
	}
}
