// Listeners and connections in odd circumstances; prints what came of it as JSON. `garbage` needs --expose-gc, `emfile` few fds (ulimit -n).
import {closeSync, mkdtempSync, openSync, rmSync} from 'node:fs';
import {tmpdir} from 'node:os';
import path from 'node:path';
import {setImmediate as turn, setTimeout as sleep} from 'node:timers/promises';
import {fileURLToPath} from 'node:url';
import {Worker, isMainThread, parentPort, workerData} from 'node:worker_threads';
import {native} from '../../../src/native.js';
import {connectSeqpacket, fdKinds, openFds} from '../helpers.js';

const [mode] = process.argv.slice(2);
const directory = isMainThread ? mkdtempSync(path.join(tmpdir(), 'sidestep-native-')) : (workerData as string);

async function collect() {
	for (let i = 0; i < 5; i++) {
		globalThis.gc!();
		await turn();
	}

	return {fds: openFds(), handles: native.openHandles()};
}

/** Forgets listeners and connections, open and with packets under way. */
async function garbage() {
	const before = await collect();
	const clients: number[] = [];
	for (let i = 0; i < 20; i++) {
		const file = path.join(directory, String(i));
		native.listenSeqpacket(file, 0o600, {
			onConnection(connection) {
				if (i % 2 === 0) {
					connection.read({onPacket() {}, onEnd() {}});
					connection.send(Buffer.of(1), 0);
				}
			},
			onError() {},
		});
		clients.push(connectSeqpacket(file));
	}

	await sleep(50);
	const open = native.openHandles();
	const between = await collect();
	for (const fd of clients) {
		native.closeFd(fd);
	}

	return {before, open, handles: between.handles, after: await collect()};
}

/** A connection that no fd is left for waits, is told of once, and is taken later. */
async function emfile() {
	let errors = 0;
	let connections = 0;
	let code: string | undefined;
	const file = path.join(directory, 'socket');
	const listener = native.listenSeqpacket(file, 0o600, {
		onConnection() {
			connections++;
		},
		onError(error) {
			errors++;
			({code} = error);
		},
	});
	const client = connectSeqpacket(file);
	await sleep(50);
	const waiting = connectSeqpacket(file);
	const fillers: number[] = [];
	try {
		for (;;) {
			fillers.push(openSync('/dev/null', 'r'));
		}
	} catch {
		// EMFILE
	}

	await sleep(200);
	const full = {connections, errors, code};
	for (const fd of fillers) {
		closeSync(fd);
	}

	listener.resume();
	await sleep(50);
	listener.close();
	native.closeFd(client);
	native.closeFd(waiting);
	return {full, connections, errors};
}

/** Never ends by itself. */
function work(): void {
	let rounds = 0;
	const round = () => {
		const file = path.join(directory, `${process.pid}-${Math.random()}`);
		const listener = native.listenSeqpacket(file, 0o600, {
			onConnection(connection) {
				connection.read({
					onPacket(bytes) {
						try {
							connection.send(bytes, 0);
						} catch {
							// The client is gone.
						}
					},
					onEnd() {},
				});
			},
			onError() {},
		});
		parentPort!.postMessage(file);
		// Every other one is left open for the end of the environment.
		if (rounds++ % 2) {
			setTimeout(() => {
				listener.close();
			}, 2);
		}

		setTimeout(round, 1);
	};

	round();
}

function talkTo(file: string): void {
	let client: number | undefined;
	try {
		client = connectSeqpacket(file);
		for (let i = 0; i < 10; i++) {
			native.send(client, Buffer.of(i));
		}
	} catch {
		// The worker has ended.
	} finally {
		if (client !== undefined) {
			native.closeFd(client);
		}
	}
}

async function workers() {
	const terminateOne = async (delay: number) => {
		const worker = new Worker(fileURLToPath(import.meta.url), {workerData: directory});
		// Here, as nobody would close the fd when the worker ends in between.
		worker.on('message', talkTo);
		await new Promise((resolve, reject) => {
			worker.once('message', resolve);
			worker.once('error', reject);
		});
		await sleep(delay);
		await worker.terminate();
	};

	await terminateOne(5);
	const before = fdKinds();
	for (let round = 0; round < 30; round++) {
		await Promise.all([0, 1, 2].map(async index => terminateOne((round * 7 + index * 3) % 23)));
	}

	return {before, after: fdKinds(), handles: native.openHandles()};
}

if (isMainThread) {
	try {
		console.log(JSON.stringify(await {garbage, emfile, workers}[mode as 'garbage' | 'emfile' | 'workers']()));
	} finally {
		rmSync(directory, {recursive: true});
	}
} else {
	work();
}
