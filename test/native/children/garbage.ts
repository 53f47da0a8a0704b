// Opens things and forgets them: the garbage collector has to close them. Needs --expose-gc.
import {native} from '../../../src/native.js';
import {fixture, openFds} from '../helpers.js';

function litter(): void {
	const object = native.openObject(fixture('small_kinds'));
	object.load();
	object.map('hash');
	object.program('allow');
	native.openRingBuffer(object.map('ring'), () => {}).unref();
	native.createNetns();
}

async function collect(): Promise<void> {
	for (let i = 0; i < 10; i++) {
		globalThis.gc!();
		await new Promise(resolve => {
			setTimeout(resolve, 1);
		});
	}
}

litter();
await collect();
const before = {fds: openFds(), handles: native.openHandles()};
for (let i = 0; i < 20; i++) {
	litter();
}

const open = native.openHandles();
await collect();
console.log(JSON.stringify({before, open, after: {fds: openFds(), handles: native.openHandles()}}));
