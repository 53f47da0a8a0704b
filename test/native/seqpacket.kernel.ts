import {spawnSync} from 'node:child_process';
import {mkdtempSync, rmSync, statSync} from 'node:fs';
import {tmpdir} from 'node:os';
import path from 'node:path';
import {setTimeout as sleep} from 'node:timers/promises';
import test, {type ExecutionContext} from 'ava';
import {type NativeError, type SeqpacketConnection, native} from '../../src/native.js';
import {eventually} from '../helpers/process.js';
import {child, connectSeqpacket, held, kernelError, openFds} from './helpers.js';

function socketPath(t: ExecutionContext): string {
	const directory = mkdtempSync(path.join(tmpdir(), 'sidestep-native-'));
	t.teardown(() => {
		rmSync(directory, {recursive: true});
	});
	return path.join(directory, 'socket');
}

interface Pair {
	readonly client: number;
	readonly connection: SeqpacketConnection;
	readonly packets: Array<readonly [string, boolean]>;
	readonly ends: Array<NativeError | undefined>;
}

async function pair(t: ExecutionContext): Promise<Pair> {
	const file = socketPath(t);
	const accepted: SeqpacketConnection[] = [];
	held(t, native.listenSeqpacket(file, 0o600, {
		onConnection(connection) {
			accepted.push(connection);
		},
		onError(error) {
			t.fail(error.message);
		},
	}));
	const client = connectSeqpacket(file);
	t.teardown(() => {
		try {
			native.closeFd(client);
		} catch {
			// By the test itself.
		}
	});
	await eventually('the connection is accepted', () => accepted.length > 0);
	const connection = held(t, accepted[0]!);
	const packets: Array<readonly [string, boolean]> = [];
	const ends: Array<NativeError | undefined> = [];
	connection.read({
		onPacket(bytes, isTruncated) {
			packets.push([Buffer.from(bytes).toString(), isTruncated]);
		},
		onEnd(error) {
			ends.push(error);
		},
	});
	return {client, connection, packets, ends};
}

test.serial('packets keep their bounds; what is longer than 4096 bytes is cut and said to be', async t => {
	const {client, connection, packets} = await pair(t);
	for (const size of [1, 4096, 4097, 2]) {
		native.send(client, Buffer.alloc(size, 'x'));
	}

	await eventually('all are there', () => packets.length === 4);
	t.deepEqual(packets.map(([text, isTruncated]) => [text.length, isTruncated]), [[1, false], [4096, false], [4096, true], [2, false]]);
	connection.send(Buffer.from('one'));
	connection.send(Buffer.from('another'));
	t.is(Buffer.from(native.receive(client, 100)).toString(), 'one');
	t.is(Buffer.from(native.receive(client, 100)).toString(), 'another');
	t.deepEqual(connection.peer, {pid: process.pid, uid: 0, gid: 0});
});

test.serial('the end comes once, after all packets, and closes', async t => {
	const {client, connection, packets, ends} = await pair(t);
	const before = native.openHandles();
	for (let i = 0; i < 200; i++) {
		native.send(client, Buffer.from(String(i)));
	}

	native.closeFd(client);
	await eventually('the end', () => ends.length > 0);
	t.is(packets.length, 200);
	t.deepEqual(ends, [undefined]);
	t.is(native.openHandles(), before - 1);
	kernelError(t, 'EBADF', () => {
		connection.send(Buffer.of(1));
	});
	kernelError(t, 'EBADF', () => connection.peer);
	await sleep(20);
	t.is(ends.length, 1);
});

test.serial('a peer that goes without reading is an end with ECONNRESET', async t => {
	const {client, connection, ends} = await pair(t);
	connection.send(Buffer.of(1));
	native.closeFd(client);
	await eventually('the end', () => ends.length > 0);
	t.is(ends[0]?.code, 'ECONNRESET');
});

test.serial('no room is EAGAIN, and an fd that is none is EBADF: nothing is sent', async t => {
	const {client, connection} = await pair(t);
	kernelError(t, 'EBADF', () => {
		connection.send(Buffer.of(1), 9999);
	});
	kernelError(t, 'EAGAIN', () => native.receive(client, 1));
	kernelError(t, 'EAGAIN', () => {
		for (let i = 0; i < 10_000; i++) {
			connection.send(Buffer.of(1));
		}
	});
});

test.serial('close() is no end; reading begins once', async t => {
	const {client, connection, packets, ends} = await pair(t);
	kernelError(t, 'EALREADY', () => {
		connection.read({onPacket() {}, onEnd() {}});
	});
	native.send(client, Buffer.of(1));
	connection.close();
	connection.close();
	await sleep(20);
	t.deepEqual([packets.length, ends.length], [0, 0]);
	kernelError(t, 'ECONNRESET', () => native.receive(client, 1));
});

test.serial('the file has its mode from the first moment on, and wrong arguments leave nothing open', t => {
	const file = socketPath(t);
	const before = [openFds(), native.openHandles()];
	const events = {onConnection() {}, onError() {}};
	t.throws(() => native.listenSeqpacket(file, 0o1777, events), {instanceOf: RangeError});
	t.throws(() => native.listenSeqpacket(file, 0o600, {} as never), {instanceOf: TypeError});
	kernelError(t, 'EADDRINUSE', () => native.listenSeqpacket(path.dirname(file), 0o600, events));
	kernelError(t, 'ENOENT', () => native.listenSeqpacket('', 0o600, events));
	kernelError(t, 'ENOENT', () => native.listenSeqpacket(path.join(file, '..', 'missing', 'socket'), 0o600, events));
	t.deepEqual([openFds(), native.openHandles()], before);
	// A stale one, of the call without handlers.
	for (const mode of [0o600, 0o640]) {
		native.listenSeqpacket(file, mode, events).close();
		t.is(statSync(file).mode & 0o777, mode);
	}
});

interface State {
	readonly fds: number;
	readonly handles: number;
}

function run<Result>(t: ExecutionContext, ...command: readonly string[]): Result {
	const {status, signal, stdout, stderr} = spawnSync(command[0]!, command.slice(1), {encoding: 'utf8', timeout: 100_000});
	t.deepEqual({status, signal}, {status: 0, signal: null}, stderr);
	return JSON.parse(stdout) as Result;
}

test.serial('what is forgotten the garbage collector closes', t => {
	const {before, open, handles, after} = run<{readonly before: State; readonly open: number; readonly handles: number; readonly after: State}>(t, process.execPath, '--expose-gc', child('seqpacket'), 'garbage');
	t.true(open > before.handles + 20, `${open}`);
	t.is(handles, before.handles);
	t.deepEqual(after, before);
});

test.serial('a connection that no fd is left for is told of once, and taken later', t => {
	const result = run<object>(t, 'sh', '-c', 'ulimit -n 100; exec "$0" "$@"', process.execPath, child('seqpacket'), 'emfile');
	t.deepEqual(result, {full: {connections: 1, errors: 1, code: 'EMFILE'}, connections: 2, errors: 1});
});

test.serial('workers terminated in the middle crash nothing and leave no fd', t => {
	const {before, after, handles} = run<{readonly before: object; readonly after: object; readonly handles: number}>(t, process.execPath, child('seqpacket'), 'workers');
	t.deepEqual(after, before);
	t.is(handles, 0);
});

