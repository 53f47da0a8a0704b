import {readFileSync, readdirSync} from 'node:fs';
import {tmpdir} from 'node:os';
import {setTimeout as sleep} from 'node:timers/promises';
import {fileURLToPath} from 'node:url';
import test from 'ava';
import {scatteredRanges} from '../../bench/ranges.js';
import type {Latency, RunTime} from '../../bench/series.js';
import {findCgroup2} from '../../src/loader/host.js';
import {addressToBytes} from '../../src/maps/address.js';
import {Running, must} from '../helpers/process.js';

const BENCH = fileURLToPath(new URL('../../bench/connect-cost.js', import.meta.url));

interface Report {
	readonly cells: ReadonlyArray<{readonly ranges: number; readonly destination: string; readonly iptables: Latency; readonly sidestep: Latency; readonly ratio: Latency; readonly runTime: RunTime}>;
}

/** What a bench of this pid would leave. */
function leftovers(pid: number): readonly string[] {
	return [
		...must('ip', 'netns', 'list').split('\n'),
		...readFileSync('/proc/self/mounts', 'utf8').split('\n'),
		...readdirSync(findCgroup2()!),
		...readdirSync(tmpdir()),
	].filter(line => line.includes(`sst-${pid}-`));
}

const network = (bytes: Uint8Array, bits: number) => Buffer.from(bytes).readUInt32BE(12) >>> (32 - bits);

test('ranges are scattered: none contains another or could be merged with one, and none has the server', t => {
	const ranges = scatteredRanges(1000).map(text => {
		const [address, bits] = text.split('/') as [string, string];
		return {bytes: addressToBytes(address), bits: Number(bits)};
	});
	t.is(new Set(ranges.map(({bits}) => bits)).size, 17);
	for (const [index, {bytes, bits}] of ranges.entries()) {
		t.not(network(bytes, 16), 10 * 256 + 77);
		t.is(network(bytes, bits) * 2 ** (32 - bits), Buffer.from(bytes).readUInt32BE(12), 'no bits beyond its length');
		for (const other of ranges.slice(index + 1)) {
			// Two that touch at all share their shorter length less one bit.
			const shorter = Math.min(bits, other.bits) - 1;
			if (network(bytes, shorter) === network(other.bytes, shorter)) {
				t.fail(`${index}`);
			}
		}
	}
});

test('the benchmark measures every cell, and cleans up', async t => {
	const bench = Running.start(process.execPath, [BENCH, '--rounds', '1', '--connections', '50', '-o', 'json']);
	t.is(await bench.ended, 0, bench.stderr);
	const {cells} = JSON.parse(bench.stdout) as Report;
	t.deepEqual(cells.map(({ranges, destination}) => `${ranges} ${destination}`), ['0 captured', ...[10, 100, 1000].flatMap(ranges => [`${ranges} captured`, `${ranges} excluded`])]);
	for (const {ranges, destination, iptables, sidestep, runTime} of cells) {
		for (const {connect, lifetime} of [iptables, sidestep]) {
			t.true(connect.p50 > 0 && connect.p50 <= connect.p99 && connect.p50 < lifetime.p50, `${ranges} ${destination}`);
		}

		t.true(runTime.connect4 > 0 && runTime.connect4 < runTime.all, `${ranges} ${destination}`);
	}

	t.deepEqual(leftovers(bench.child.pid!), []);
});

test('the benchmark cleans up on Ctrl-C', async t => {
	const bench = Running.start(process.execPath, [BENCH]);
	while (leftovers(bench.child.pid!).length < 5) {
		await sleep(20);
	}

	t.is(await bench.stop('SIGINT'), 130, bench.stderr);
	t.deepEqual(leftovers(bench.child.pid!), []);
});
