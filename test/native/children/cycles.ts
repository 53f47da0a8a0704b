// Loads and closes a small object over and over; prints what that left behind as JSON. Needs --expose-gc.
import {native} from '../../../src/native.js';
import {fixture, openFds, u32} from '../helpers.js';

const cycles = Number(process.argv[2]);
const key = u32(0);

function cycle(): void {
	const object = native.openObject(fixture('small'));
	object.load();
	const runs = object.map('runs');
	const program = object.program('count');
	program.testRun({data: new Uint8Array(14)});
	runs.lookup(key);
	// In another order each time would change nothing: each owns its fd.
	object.close();
	runs.close();
	program.close();
}

async function measure() {
	// Finalisers run in a later turn of the loop.
	for (let i = 0; i < 5; i++) {
		globalThis.gc!();
		await new Promise(resolve => {
			setImmediate(resolve);
		});
	}

	return {fds: openFds(), handles: native.openHandles(), rss: process.memoryUsage().rss};
}

for (let i = 0; i < 500; i++) {
	cycle();
}

const before = await measure();
const started = performance.now();
for (let i = 0; i < cycles; i++) {
	cycle();
	// The garbage of JS wrappers is freed in a turn of the loop only.
	if (i % 500 === 499) {
		await new Promise(resolve => {
			setImmediate(resolve);
		});
	}
}

const ms = performance.now() - started;
const after = await measure();
console.log(JSON.stringify({ms, before, after}));
