import {spawnSync} from 'node:child_process';
import {setImmediate as turn, setTimeout as sleep} from 'node:timers/promises';
import test, {type ExecutionContext} from 'ava';
import {native} from '../../src/native.js';
import {child, held, kernelError, loaded, mapOf, readU64, u32} from './helpers.js';

function ring(t: ExecutionContext, bytes?: number) {
	const object = loaded(t, 'small_kinds', object => {
		if (bytes) {
			object.setMaxEntries('ring', bytes);
		}
	});
	const program = held(t, object.program('emit'));
	const emitted = mapOf(t, object, 'emitted');
	return {
		map: mapOf(t, object, 'ring'),
		emit(count: number) {
			program.testRun({data: new Uint8Array(14), repeat: count});
		},
		dropped: () => Number(readU64(emitted.lookup(u32(1))!)),
	};
}

async function until(condition: () => boolean, what: string) {
	const end = Date.now() + 10_000;
	while (!condition()) {
		if (Date.now() > end) {
			throw new Error(`after 10 s: ${what}`);
		}

		await turn();
	}
}

test.serial('samples arrive complete and in order', async t => {
	const {map, emit} = ring(t);
	const seen: bigint[] = [];
	const reader = held(t, native.openRingBuffer(map, sample => {
		t.is(sample.length, 8);
		seen.push(readU64(sample));
	}));
	emit(3000);
	await until(() => seen.length === 3000, 'all samples');
	emit(3000);
	await until(() => seen.length === 6000, 'all samples of the second round');
	t.true(seen.every((number, index) => number === BigInt(index)));
	t.is(reader.received, 6000n);
});

test.serial('a sample stays what it was after its callback', async t => {
	const {map, emit} = ring(t);
	const kept: Uint8Array[] = [];
	held(t, native.openRingBuffer(map, sample => {
		kept.push(sample);
	}));
	emit(100);
	await until(() => kept.length === 100, 'all samples');
	t.true(kept.every((sample, index) => readU64(sample) === BigInt(index)));
});

test.serial('a wake-up is bounded, other work gets its turn, and what is left arrives without a new sample', async t => {
	const {map, emit} = ring(t);
	let inThisTurn = 0;
	let most = 0;
	let received = 0;
	let turns = 0;
	let timers = 0;
	const timer = setInterval(() => {
		timers++;
	}, 0);
	t.teardown(() => {
		clearInterval(timer);
	});
	held(t, native.openRingBuffer(map, () => {
		received++;
		most = Math.max(most, ++inThisTurn);
		// Long enough that a timer of 1 ms is due within a few wake-ups.
		const end = performance.now() + 0.02;
		while (performance.now() < end);
	}, {maxPerWakeup: 100}));
	emit(5000);
	const end = Date.now() + 10_000;
	while (received < 5000 && Date.now() < end) {
		await turn();
		turns++;
		inThisTurn = 0;
	}

	t.is(received, 5000);
	t.is(most, 100);
	t.true(turns >= 50, `${turns} turns`);
	t.true(timers >= 10, `${timers} timers`);
});

test.serial('the default bound is 8192', async t => {
	const {map, emit} = ring(t);
	let received = 0;
	emit(20_000);
	const jumps: number[] = [];
	held(t, native.openRingBuffer(map, () => {
		received++;
	}));
	for (let before = 0; received < 20_000; before = received) {
		await turn();
		if (received !== before) {
			jumps.push(received - before);
		}
	}

	t.deepEqual(jumps, [8192, 8192, 3616]);
});

test.serial('what found no room is lost, and the program counts it', async t => {
	const {map, emit, dropped} = ring(t, 4096);
	let received = 0;
	held(t, native.openRingBuffer(map, () => {
		received++;
	}));
	emit(1000);
	await until(() => received > 0, 'a sample');
	await sleep(20);
	t.is(received, 255);
	t.is(dropped(), 1000 - 255);
	emit(10);
	await until(() => received === 265, 'samples after the loss');
});

test.serial('the callback may close the ring, and is not called again', async t => {
	const {map, emit} = ring(t);
	let received = 0;
	const before = native.openHandles();
	const reader = native.openRingBuffer(map, () => {
		if (++received === 3) {
			reader.close();
			reader.close();
		}
	});
	emit(100);
	await until(() => received >= 3, 'samples');
	await sleep(20);
	t.is(received, 3);
	t.is(native.openHandles(), before);
	kernelError(t, 'EBADF', () => {
		reader.ref();
	});
	kernelError(t, 'EBADF', () => {
		reader.unref();
	});
});

test.serial('a second reader goes on where a closed one stopped', async t => {
	const {map, emit} = ring(t);
	emit(10);
	const seen: bigint[] = [];
	const first = native.openRingBuffer(map, sample => {
		seen.push(readU64(sample));
		if (seen.length === 4) {
			first.close();
		}
	});
	await until(() => seen.length === 4, 'the first reader');
	held(t, native.openRingBuffer(map, sample => {
		seen.push(readU64(sample));
	}));
	await until(() => seen.length === 10, 'the second reader');
	t.deepEqual(seen, Array.from({length: 10}, (_, index) => BigInt(index)));
});

test.serial('wrong arguments are refused and leave nothing open', t => {
	const {map} = ring(t);
	const other = mapOf(t, loaded(t, 'small'), 'runs');
	const before = native.openHandles();
	t.throws(() => native.openRingBuffer({} as never, () => {}), {instanceOf: TypeError});
	t.throws(() => native.openRingBuffer(map, undefined as never), {instanceOf: TypeError});
	t.throws(() => native.openRingBuffer(map, () => {}, {maxPerWakeup: 0}), {instanceOf: RangeError});
	kernelError(t, 'EINVAL', () => native.openRingBuffer(other, () => {}));
	t.is(native.openHandles(), before);
});

test.serial('an exception of the callback is uncaught in the usual way, and the ring goes on', t => {
	const {status, stdout, stderr} = spawnSync(process.execPath, [child('ring-throws')], {encoding: 'utf8', timeout: 20_000});
	t.is(status, 0, stderr);
	t.deepEqual(JSON.parse(stdout), {uncaught: 10, received: '10'});
});

test.serial('an exception that nobody catches ends the process as any other', t => {
	const {status, stderr} = spawnSync(process.execPath, [child('ring-throws'), 'fatal'], {encoding: 'utf8', timeout: 20_000});
	t.is(status, 1, stderr);
	t.regex(stderr, /Error: sample 0/);
});

test.serial('a ring keeps the event loop alive, and does not after unref', t => {
	const ended = spawnSync(process.execPath, [child('ring-unref'), 'unref'], {encoding: 'utf8', timeout: 20_000});
	t.is(ended.status, 0, ended.stderr);
	const alive = spawnSync(process.execPath, [child('ring-unref')], {encoding: 'utf8', timeout: 1500});
	t.is(alive.status, null, alive.stderr);
	t.is(alive.signal, 'SIGTERM');
});

test.serial('process.exit() inside the callback ends the process cleanly', t => {
	const {status, signal, stderr} = spawnSync(process.execPath, [child('ring-throws'), 'exit'], {encoding: 'utf8', timeout: 20_000});
	t.deepEqual([status, signal], [7, null], stderr);
});

test.serial('100,000 samples in rounds are all handed over', async t => {
	const {map, emit} = ring(t);
	let received = 0;
	held(t, native.openRingBuffer(map, () => {
		received++;
	}));
	const started = performance.now();
	for (let round = 0; round < 4; round++) {
		emit(25_000);
		await until(() => received === 25_000 * (round + 1), 'all samples of a round');
	}

	const ms = performance.now() - started;
	t.log(`100,000 samples in ${ms.toFixed(0)} ms`);
	t.is(received, 100_000);
});
