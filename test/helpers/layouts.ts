/** Objects of layouts that come after this build's (test/fixtures/layouts.cmake), and how their maps are filled. */
import {fileURLToPath} from 'node:url';
import {load, type Datapath} from '../../src/loader/datapath.js';
import {takeWriterLock} from '../../src/loader/lock.js';
import type {Migration} from '../../src/loader/migrations.js';
import {PinLayout} from '../../src/loader/paths.js';
import {native} from '../../src/native.js';
import type {World} from './world.js';

/** By layout; 2 is this build's own. */
export const OBJECTS: Readonly<Record<number, string>> = Object.fromEntries([
	[2, 'sidestep.bpf.o'], [3, 'test/layout3.o'], [4, 'test/layout4.o'], [5, 'test/layout5.o'],
].map(([layout, file]) => [layout, fileURLToPath(new URL(`../../../build/${file}`, import.meta.url))]));

type Passed = {readonly passed: readonly unknown[]};
const withTestReason = (direction: Passed) => ({...direction, passed: [...direction.passed, {bytes: 0n, messages: 0n}]});

export const TEST_MIGRATIONS: readonly Migration[] = [
	{
		from: 2,
		maps: {
			counters: (netns, {count}) => [netns, {count: [...count, 0n]}],
			traffic: (netns, {sentByClient, sentByServer}) => [netns, {sentByClient: withTestReason(sentByClient), sentByServer: withTestReason(sentByServer)}],
		},
	},
	{
		from: 3,
		maps: {
			pods: (netns, pod) => [netns, {...pod, testGeneration: pod.policy + 1000}],
			exemptions: (key, value) => key.kind === 'EXEMPT_INTERFACE' ? undefined : [{...key, id: key.id + 1n}, value],
		},
	},
	{from: 4, maps: {}},
];

/** What every hook of the datapath runs on the world's cgroup: programs' ids, by attach type. */
export function attached(world: World): ReadonlyMap<number, readonly number[]> {
	return new Map([3, 8, 9, 10, 11, 14, 15, 19, 20, 21, 29, 30].map(type => [type, native.cgroupPrograms(world.cgroup, type)]));
}

/** Starts a build of that layout, and lets it go again. */
export function start(world: World, layout: number, options: Partial<Parameters<typeof load>[1]> & {readonly look?: (datapath: Datapath) => void} = {}) {
	const lock = takeWriterLock(new PinLayout(world.bpffs, layout));
	try {
		const {datapath, how} = load(lock, {cgroup: world.cgroup, object: OBJECTS[layout]!, migrations: TEST_MIGRATIONS, ...options});
		try {
			options.look?.(datapath);
		} finally {
			datapath.close();
		}

		return how;
	} finally {
		lock.release();
	}
}
