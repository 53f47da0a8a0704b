/** The loader dies at each of its steps; the next start repairs it. */
import {appendFileSync, copyFileSync, existsSync, readdirSync} from 'node:fs';
import path from 'node:path';
import {fileURLToPath} from 'node:url';
import test from 'ava';
import {native} from '../../src/native.js';
import {CGROUP_PROGRAMS, PROGRAMS, openDatapath, load, unload} from '../../src/loader/datapath.js';
import {MAP_NAMES} from '../../src/maps/schema.js';
import {takeWriterLock} from '../../src/loader/lock.js';
import {PinLayout} from '../../src/loader/paths.js';
import {eventually, run} from '../helpers/process.js';
import {World} from '../helpers/world.js';

const CHILD = fileURLToPath(new URL('../helpers/dying-loader.js', import.meta.url));
const OBJECT = fileURLToPath(new URL('../../../build/sidestep.bpf.o', import.meta.url));

function attached(world: World): number {
	return [3, 8, 9, 10, 11, 14, 15, 19, 20, 21, 29, 30].flatMap(type => native.cgroupPrograms(world.cgroup, type)).length;
}

/** Runs `what` in a process that kills itself after its step number `dieAt`. @returns the step's name, or undefined when there were fewer. */
function dieAt(world: World, what: 'load' | 'unload', step: number, object = OBJECT): string | undefined {
	const {code, stdout, stderr} = run(process.execPath, [CHILD, what, world.bpffs, world.cgroup, String(step), object]);
	if (code === 0) {
		return undefined;
	}

	if (code !== null) {
		throw new Error(`the child failed by itself: ${stderr}`);
	}

	return stdout.trim().split('\n').at(-1);
}

function loadHere(world: World, object = OBJECT) {
	const lock = takeWriterLock(new PinLayout(world.bpffs, 2));
	try {
		const {datapath, how} = load(lock, {cgroup: world.cgroup, object});
		datapath.close();
		return how;
	} finally {
		lock.release();
	}
}

function unloadHere(world: World): void {
	const lock = takeWriterLock(new PinLayout(world.bpffs, 2));
	try {
		unload(lock);
	} finally {
		lock.release();
	}
}

test('a first start that dies at any step is repaired by the next one', t => {
	const world = World.create(t);
	const steps: string[] = [];
	for (let step = 1; ; step++) {
		const name = dieAt(world, 'load', step);
		if (name === undefined) {
			break;
		}

		steps.push(name);
		const how = loadHere(world);
		t.is(how, name === 'renamed' ? 'adopted' : 'loaded', `died after: ${name}`);
		t.is(attached(world), CGROUP_PROGRAMS.length, `died after: ${name}`);
		t.deepEqual(readdirSync(`${world.bpffs}/sidestep`), ['v2']);
		unloadHere(world);
		t.is(attached(world), 0, `died after: ${name}`);
		t.deepEqual(readdirSync(`${world.bpffs}/sidestep`), []);
	}

	t.is(steps.length, 4 + 2 * CGROUP_PROGRAMS.length, steps.join(', '));
	unloadHere(world);
});

test('an update to another object that dies at any step is finished by the next start, and never lacks a program', t => {
	const world = World.create(t);
	// Bytes behind the ELF file's end change its hash and nothing else.
	const other = path.join(world.directory, 'other.bpf.o');
	copyFileSync(OBJECT, other);
	appendFileSync(other, 'other');
	const steps: string[] = [];
	for (let step = 1; ; step++) {
		t.is(loadHere(world), 'loaded');
		const before = openDatapath(world.bpffs);
		before.maps.counters.set(4711n, {count: before.schema.reasons.map(() => 3n)});
		before.close();
		const name = dieAt(world, 'load', step, other);
		t.is(attached(world), CGROUP_PROGRAMS.length, `died after: ${name ?? 'nothing'}`);
		if (name === undefined) {
			unloadHere(world);
			break;
		}

		steps.push(name);
		t.is(loadHere(world, other), 'replaced', `died after: ${name}`);
		t.is(loadHere(world, other), 'adopted');
		const after = openDatapath(world.bpffs);
		for (const [program, link] of after.links) {
			t.is(link.info().programId, after.programs.get(program)!.info().id, `${program}, died after: ${name}`);
		}

		t.is(after.maps.counters.getAll(4711n)![0]!.count[0], 3n, 'maps are kept');
		after.close();
		t.false(existsSync(`${world.bpffs}/sidestep/stage`));
		unloadHere(world);
	}

	t.is(steps.length, 1 + 2 * PROGRAMS.length, steps.join(', '));
});

test('an unload that dies at any step is finished by the next start or unload', t => {
	const world = World.create(t);
	let steps = 0;
	for (let step = 1; ; step++) {
		loadHere(world);
		const name = dieAt(world, 'unload', step);
		if (name === undefined) {
			break;
		}

		steps++;
		if (step % 2 === 0) {
			t.is(loadHere(world), 'loaded', `died after: ${name}`);
			t.is(attached(world), CGROUP_PROGRAMS.length);
		}

		unloadHere(world);
		t.is(attached(world), 0, `died after: ${name}`);
		t.deepEqual(readdirSync(`${world.bpffs}/sidestep`), []);
	}

	t.is(steps, 1 + CGROUP_PROGRAMS.length + PROGRAMS.length + MAP_NAMES.length);
});

test('programs whose cgroup was removed are attached again', async t => {
	const world = World.create(t);
	const inner = world.subCgroup('inner');
	const lock = takeWriterLock(new PinLayout(world.bpffs, 2));
	t.teardown(() => {
		lock.release();
	});
	load(lock, {cgroup: inner}).datapath.close();
	run('rmdir', [inner]);
	run('mkdir', [inner]);
	// The kernel lets go of a removed cgroup a moment later.
	await eventually('the links have lost their cgroup', () => {
		const gone = openDatapath(world.bpffs);
		const ids = [...gone.links.values()].map(link => link.info().targetId);
		gone.close();
		return ids.every(id => id === 0n);
	});
	const {how, datapath} = load(lock, {cgroup: inner});
	t.is(how, 'replaced');
	for (const link of datapath.links.values()) {
		t.is(link.info().targetId, native.cgroupId(inner));
	}

	datapath.close();
	unload(lock);
});

test('a failure in the middle of a first start leaves nothing behind', t => {
	const world = World.create(t);
	const lock = takeWriterLock(new PinLayout(world.bpffs, 2));
	t.teardown(() => {
		lock.release();
	});
	const before = native.openHandles();
	t.throws(() => load(lock, {
		cgroup: world.cgroup,
		onStep(step) {
			if (step === 'connect4 attached') {
				throw new Error('stop here');
			}
		},
	}), {message: 'stop here'});
	t.is(attached(world), 0);
	t.deepEqual(readdirSync(`${world.bpffs}/sidestep`), []);
	t.is(native.openHandles(), before);
});
