/** When which pod is looked at, with rounds that fail. */
import test, {type ExecutionContext} from 'ava';
import type {PodSpec} from '../../src/config/pods-file.js';
import {ControlLoop} from '../../src/pods/loop.js';
import type {Reconciler, Round} from '../../src/pods/reconcile.js';
import {eventually} from '../helpers/process.js';

const FIRST_RETRY_MS = 250;

interface Looked {
	readonly at: number;
	readonly names: readonly string[];
}

/** A loop over so many pods that is settled, and whose rounds throw while `isBroken`. */
async function settled(t: ExecutionContext, count: number) {
	const specs = new Map<string, PodSpec>();
	const add = (name: string) => specs.set(name, {name, wish: {leave: 'a test'}});
	for (let index = 0; index < count; index++) {
		add(`p${index}`);
	}

	const state = {isBroken: false, failing: new Set<string>(), rivals: new Map<string, string>(), rounds: [] as Looked[], errors: 0};
	const reconciler = {
		round(_: unknown, due: ReadonlySet<string>): Round {
			state.rounds.push({at: performance.now(), names: [...due]});
			if (state.isBroken) {
				throw new Error('EMFILE: too many open files');
			}

			const looked = new Set([...due, ...[...due].flatMap(name => state.rivals.get(name) ?? [])]);
			return {enrolled: [], failures: new Map([...looked].filter(name => state.failing.has(name)).map(name => [name, new Error('it fails')])), changes: [], notes: [], namespaces: new Map(), looked};
		},
	};
	const loop = new ControlLoop(reconciler as unknown as Reconciler, {
		specs: () => specs,
		resyncMs: 60_000,
		onRound() {},
		onError() {
			state.errors++;
		},
	});
	const end = new AbortController();
	const ended = loop.run(end.signal);
	t.teardown(async () => {
		end.abort();
		await ended;
	});
	await eventually('it is settled', () => loop.isSettled);
	state.rounds.length = 0;
	return {loop, specs, state, add};
}

test('a round that fails is made up for: the pods it was for are looked at in the next one, new and gone ones as well', async t => {
	const {loop, specs, state, add} = await settled(t, 40);
	state.isBroken = true;
	specs.delete('p7');
	add('new');
	loop.wake(['p7', 'new']);
	await eventually('it fails', () => state.errors > 0);
	state.isBroken = false;
	await eventually('it is tried again', () => state.rounds.length > 1);
	t.deepEqual(state.rounds[1]!.names, ['p7', 'new']);
});

test('after rounds that fail it waits, twice as long each time, whatever is heard meanwhile; after a good one it does not', async t => {
	const {loop, state} = await settled(t, 2);
	state.isBroken = true;
	const hearing = setInterval(() => {
		loop.wake(['p1']);
	}, 5);
	t.teardown(() => {
		clearInterval(hearing);
	});
	await eventually('some fail', () => state.errors >= 4);
	const times = state.rounds.map(({at}) => at);
	for (let index = 1; index < times.length; index++) {
		const gapMs = times[index]! - times[index - 1]!;
		// Timers may be early by a part of a millisecond.
		t.true(gapMs >= FIRST_RETRY_MS * 2 ** (index - 1) - 1, `round ${index} came after ${gapMs} ms`);
	}

	state.isBroken = false;
	const failed = state.rounds.length;
	await eventually('it works', () => state.rounds.length > failed + 3);
	state.isBroken = true;
	state.errors = 0;
	const before = state.rounds.length;
	await eventually('it fails again', () => state.errors >= 2);
	t.true(state.rounds.at(-1)!.at - state.rounds[before]!.at < FIRST_RETRY_MS * 8, 'from the beginning');
});

test('a pod that fails as another\'s rival is tried again soon, too', async t => {
	const {loop, state} = await settled(t, 2);
	state.rivals.set('p0', 'p1');
	state.failing.add('p1');
	loop.wake(['p0']);
	await eventually('the rival is looked at', () => state.rounds.some(({names}) => names.join() === 'p1'), 10_000);
	t.deepEqual(state.rounds[0]!.names, ['p0']);
});
