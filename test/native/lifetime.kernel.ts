import {spawnSync} from 'node:child_process';
import test, {type ExecutionContext} from 'ava';
import {child} from './helpers.js';

/** Runs a child to its end and gives what it printed. A crash is a signal, or a status other than 0. */
function run<Result>(t: ExecutionContext, name: string, ...args: string[]): Result {
	const {status, signal, stdout, stderr} = spawnSync(process.execPath, ['--expose-gc', child(name), ...args], {encoding: 'utf8', timeout: 100_000});
	t.deepEqual({status, signal}, {status: 0, signal: null}, stderr);
	return JSON.parse(stdout) as Result;
}

type State = {readonly fds: number; readonly handles: number; readonly rss: number};

test.serial('10,000 times load and close leave no fd, no handle and no memory', t => {
	const {ms, before, after} = run<{readonly ms: number; readonly before: State; readonly after: State}>(t, 'cycles', '10000');
	t.log(`10,000 cycles in ${(ms / 1000).toFixed(1)} s, ${((after.rss - before.rss) / 2 ** 20).toFixed(1)} MiB more`);
	t.is(after.fds, before.fds);
	t.is(after.handles, before.handles);
	// A leak of 1 KiB a cycle would be 10 MiB; V8's heap alone wavers by a few.
	t.true(after.rss - before.rss < 10 * 2 ** 20, `RSS grew by ${after.rss - before.rss} bytes`);
	t.true(ms < 60_000, `${ms} ms`);
});

test.serial('what is forgotten without close() the garbage collector closes', t => {
	const {before, open, after} = run<{readonly before: State; readonly open: number; readonly after: State}>(t, 'garbage');
	t.true(open > before.handles);
	t.deepEqual(after, before);
});

test.serial('workers terminated in the middle, 50 times three at once, crash nothing and leave no fd', t => {
	type Kinds = Readonly<Record<string, number>>;
	const {before, after, handles} = run<{readonly before: Kinds; readonly after: Kinds; readonly handles: number}>(t, 'workers', '50');
	t.deepEqual(after, before);
	t.is(handles, 0);
});
