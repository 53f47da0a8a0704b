// Workers that load, close and leave things open, terminated in the middle: prints the kinds of fds before and after as JSON.
import {fileURLToPath} from 'node:url';
import {Worker, isMainThread, parentPort} from 'node:worker_threads';
import {type BpfObject, native} from '../../../src/native.js';
import {fixture, fdKinds} from '../helpers.js';

const AF_INET = 2;
const SOCK_STREAM = 1;

/** Never ends by itself. */
function work(): void {
	const left: unknown[] = [];
	let rounds = 0;
	const round = () => {
		const object: BpfObject = native.openObject(fixture('small_kinds'));
		object.load();
		const emit = object.program('emit');
		const reader = native.openRingBuffer(object.map('ring'), () => {
			if (rounds % 3 === 0) {
				native.openObject(fixture('small')).close();
			}
		});
		emit.testRun({data: new Uint8Array(14), repeat: 50});
		const netns = native.createNetns();
		netns.setUp('lo');
		native.closeFd(netns.socket(AF_INET, SOCK_STREAM, 0));
		netns.addresses();
		object.map('hash').entries();
		try {
			native.openPinnedMap('/nonexistent');
		} catch {}

		try {
			const refused = native.openObject(fixture('small_refused'));
			left.push(refused);
			refused.load();
		} catch {}

		// Every other round is left open for the end of the environment.
		if (rounds % 2) {
			reader.close();
			object.close();
			netns.close();
			emit.close();
		} else if (left.length < 20) {
			left.push(object, reader, netns, emit);
		} else {
			reader.close();
			left.splice(0);
		}

		if (rounds++ === 0) {
			parentPort!.postMessage('working');
		}

		setImmediate(round);
	};

	round();
}

async function main(): Promise<void> {
	const file = fileURLToPath(import.meta.url);
	const terminateOne = async (delay: number) => {
		const worker = new Worker(file);
		await new Promise((resolve, reject) => {
			worker.once('message', resolve);
			worker.once('error', reject);
		});
		await new Promise(resolve => {
			setTimeout(resolve, delay);
		});
		await worker.terminate();
	};

	await terminateOne(5);
	const before = fdKinds();
	for (let round = 0; round < Number(process.argv[2]); round++) {
		await Promise.all([0, 1, 2].map(async index => terminateOne((round * 7 + index * 3) % 23)));
	}

	// Nothing of this thread's own is open, whatever the workers did.
	console.log(JSON.stringify({before, after: fdKinds(), handles: native.openHandles()}));
}

if (isMainThread) {
	await main();
} else {
	work();
}
