/** The server and a stand-in for ztunnel that is a process of its own: real namespaces, real listeners in them. */
import {once} from 'node:events';
import {readdirSync} from 'node:fs';
import path from 'node:path';
import {setTimeout as sleep} from 'node:timers/promises';
import {isDeepStrictEqual} from 'node:util';
import test from 'ava';
import {native, type SeqpacketConnection} from '../../src/native.js';
import {eventually, type Running} from '../helpers/process.js';
import {TestNetns, directoryOf, serve, startZtunnel, workload, type ZdsLine} from './helpers.js';
import {SNAPSHOT_SENT, del, keep} from './peer.js';

const AF_INET = 2;
const SOCK_STREAM = 1;
const OUTBOUND = 15_001;
const TUNNEL = 15_008;

const loopback = (port: number) => Buffer.of(AF_INET, 0, port >> 8, port & 0xff, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0);

/** `ok`, or the error of a connection to 127.0.0.1 in the namespace. */
function reach({netns}: TestNetns, port = TUNNEL): string {
	const fd = netns.socket(AF_INET, SOCK_STREAM, 0);
	try {
		native.connect(fd, loopback(port));
		return 'ok';
	} catch (error) {
		return (error as NodeJS.ErrnoException).code!;
	} finally {
		native.closeFd(fd);
	}
}

const told = (ztunnel: Running) => ztunnel.lines<ZdsLine>().filter(line => 'zds' in line).map(({zds, uid, workloads}) => [zds, uid ?? workloads].join(' ').trim());

test.serial('ztunnel listens in each namespace when its Add is acknowledged, and no more when it was deleted', async t => {
	const {server, socketPath} = serve(t);
	const ztunnel = startZtunnel(t, socketPath);
	const [a, b] = [new TestNetns(t), new TestNetns(t)] as const;
	server.put(workload('a', a.open));
	server.put(workload('b', b.open));
	for (const [uid, netns] of [['a', a], ['b', b]] as const) {
		t.deepEqual(await server.settled(uid, 30_000), {kind: 'acknowledged'});
		t.is(reach(netns), 'ok');
		t.is(reach(netns, OUTBOUND), 'ok');
	}

	const {inode} = a.netns;
	await ztunnel.until('it has told of both', () => told(ztunnel).includes('add b'));
	t.like(ztunnel.lines<ZdsLine>().find(line => line.uid === 'a'), {zds: 'add', name: 'name-a', namespace: 'shop', service_account: 'account', inode: Number(inode)});
	t.like(server.connections[0], {pid: ztunnel.child.pid!, isCurrent: true});

	const other = new TestNetns(t);
	server.put(workload('a', other.open));
	t.deepEqual(await server.settled('a', 30_000), {kind: 'acknowledged'});
	t.is(reach(other), 'ok');
	t.is(reach(a), 'ECONNREFUSED');
	server.remove('b');
	await eventually('it does not listen any more', () => reach(b) === 'ECONNREFUSED');
	t.is(reach(other), 'ok');
});

test.serial('an agent that restarts: what ztunnel has stays, what is gone goes, Keep keeps', async t => {
	const first = serve(t);
	const [stays, goes, hidden] = [new TestNetns(t), new TestNetns(t), new TestNetns(t)] as const;
	const ztunnel = startZtunnel(t, first.socketPath);
	const namespaces = {stays, goes, hidden};
	for (const [uid, {open}] of Object.entries(namespaces)) {
		first.server.put(workload(uid, open));
		t.is((await first.server.settled(uid, 30_000)).kind, 'acknowledged');
	}

	first.server.close();
	await ztunnel.until('it is disconnected', () => told(ztunnel).includes('disconnected'));
	t.deepEqual(Object.values(namespaces).map(netns => reach(netns)), ['ok', 'ok', 'ok']);

	const {server} = serve(t, {socketPath: first.socketPath});
	server.put(workload('stays', stays.open));
	server.put(workload('hidden', () => undefined));
	t.is((await server.settled('stays', 30_000)).kind, 'acknowledged');
	await eventually('the snapshot is done', () => server.connections[0]?.isSnapshotDone === true);
	await ztunnel.until('it has told of all', () => told(ztunnel).at(-1) === 'snapshot 2');
	t.deepEqual(told(ztunnel).slice(-4), ['connected', 'add stays', 'keep hidden', 'snapshot 2']);
	t.deepEqual(Object.values(namespaces).map(netns => reach(netns)), ['ok', 'ECONNREFUSED', 'ok']);
	server.put(workload('hidden', hidden.open));
	t.is((await server.settled('hidden', 30_000)).kind, 'acknowledged');
	t.is(ztunnel.hasEnded, false, ztunnel.stderr);
});

test.serial('a held snapshot: ztunnel keeps what it has until all pods were put, and has a protocol error nowhere', async t => {
	const first = serve(t);
	const [early, late, hidden, goes] = [new TestNetns(t), new TestNetns(t), new TestNetns(t), new TestNetns(t)] as const;
	const ztunnel = startZtunnel(t, first.socketPath);
	const namespaces = {early, late, hidden, goes};
	for (const [uid, {open}] of Object.entries(namespaces)) {
		first.server.put(workload(uid, open));
		t.is((await first.server.settled(uid, 30_000)).kind, 'acknowledged');
	}

	first.server.close();
	await ztunnel.until('it is disconnected', () => told(ztunnel).includes('disconnected'));
	const before = told(ztunnel).length;
	const {server} = serve(t, {socketPath: first.socketPath, isHeld: true});
	server.put(workload('early', early.open));
	server.put(workload('goes', goes.open));
	t.is((await server.settled('goes', 30_000)).kind, 'acknowledged');
	server.remove('goes');
	await sleep(500);
	t.deepEqual(Object.values(namespaces).map(netns => reach(netns)), ['ok', 'ok', 'ok', 'ok']);

	server.put(workload('late', late.open));
	server.put(workload('hidden', () => undefined));
	server.release();
	await ztunnel.until('it has told of all', () => told(ztunnel).at(-1) === 'delete goes');
	t.deepEqual(told(ztunnel).slice(before), ['connected', 'add early', 'add goes', 'add late', 'keep hidden', 'snapshot 4', 'delete goes']);
	t.deepEqual(Object.values(namespaces).map(netns => reach(netns)), ['ok', 'ok', 'ok', 'ECONNREFUSED']);
	t.false(ztunnel.hasEnded, ztunnel.stderr);
});

test.serial('ztunnel\'s stand-in ends itself at what the real one takes for an error of the protocol', async t => {
	for (const [packets, error] of [
		[[del('a')], 'Del before the snapshot\'s end'], [[SNAPSHOT_SENT, keep('a')], 'Keep after the snapshot'], [[SNAPSHOT_SENT, SNAPSHOT_SENT], 'a second snapshot'],
	] as const) {
		const socketPath = path.join(directoryOf(t), 'ztunnel.sock');
		const connections: SeqpacketConnection[] = [];
		const listener = native.listenSeqpacket(socketPath, 0o600, {
			onConnection(connection) {
				connections.push(connection);
			},
			onError(error) {
				t.fail(error.message);
			},
		});
		const ztunnel = startZtunnel(t, socketPath);
		await eventually('it is connected', () => connections.length > 0);
		for (const packet of packets) {
			connections[0]!.send(Buffer.from(packet, 'hex'));
		}

		t.is(await ztunnel.ended, 3);
		t.is(ztunnel.stderr, `protocol error: ${error}\n`);
		connections[0]!.close();
		listener.close();
	}
});

test.serial('a namespace that ztunnel cannot serve is refused with its word; ztunnel tries again, and putting it again tells', async t => {
	const {server, socketPath} = serve(t);
	const [good, bad] = [new TestNetns(t), new TestNetns(t)] as const;
	const squatter = bad.netns.socket(AF_INET, SOCK_STREAM, 0);
	native.bind(squatter, loopback(OUTBOUND));
	native.listen(squatter, 1);
	const ztunnel = startZtunnel(t, socketPath, '--retry', '100');
	server.put(workload('bad', bad.open));
	server.put(workload('good', good.open));
	t.deepEqual(await server.settled('bad', 30_000), {kind: 'refused', error: 'failure to start proxy: [::]:15001: EADDRINUSE'});
	t.deepEqual(await server.settled('good', 30_000), {kind: 'acknowledged'});
	t.is(reach(bad), 'ECONNREFUSED');
	await ztunnel.until('it has tried again', () => told(ztunnel).includes('retry bad'));

	native.closeFd(squatter);
	await eventually('it succeeds', () => reach(bad) === 'ok');
	t.is(server.state('bad').kind, 'refused');
	server.put(workload('bad', bad.open));
	t.deepEqual(await server.settled('bad', 30_000), {kind: 'acknowledged'});
});

/** Short, but not for a good ztunnel on a busy machine. */
const ACK_TIMEOUT_MS = 3000;

for (const [reason, options] of [
	['unanswered', ['--misbehave', 'mute']],
	['unanswered', ['--late', String(2 * ACK_TIMEOUT_MS)]],
	['malformed', ['--misbehave', 'garbage']],
	['oversized', ['--misbehave', 'oversized']],
	['unexpected', ['--misbehave', 'twice']],
	['broken', ['--die-after', '2']],
] as const) {
	test.serial(`a ztunnel with ${options.join(' ')} is dropped (${reason}), and a good one goes on where it was`, async t => {
		const {server, socketPath, lines} = serve(t, reason === 'unanswered' ? {ackTimeoutMs: ACK_TIMEOUT_MS} : {});
		const [a, b] = [new TestNetns(t), new TestNetns(t)] as const;
		server.put(workload('a', a.open));
		server.put(workload('b', b.open));
		const good = startZtunnel(t, socketPath);
		t.is((await server.settled('b', 30_000)).kind, 'acknowledged');
		startZtunnel(t, socketPath, ...options);
		await eventually('it is dropped', () => server.counters.dropped[reason] > 0 || server.counters.dropped.ended > 0);
		t.true(server.counters.dropped[reason] > 0 || reason === 'broken', lines.join('\n'));
		t.is((await server.settled('b', 30_000)).kind, 'acknowledged');
		t.is(good.hasEnded, false);
		t.true(server.connections.some(({pid}) => pid === good.child.pid));
	});
}

test.serial('fds that a ztunnel sends are not taken in', async t => {
	const {server, socketPath} = serve(t);
	const netns = new TestNetns(t);
	const ztunnel = startZtunnel(t, socketPath, '--misbehave', 'fd');
	await eventually('it is connected', () => server.connections[0]?.isSnapshotDone === true);
	const before = readdirSync('/proc/self/fd').length;
	for (let i = 0; i < 50; i++) {
		server.put(workload(`w${i}`, netns.open));
	}

	await eventually('all are answered', () => server.counters.acks === 51);
	t.is(readdirSync('/proc/self/fd').length, before);
	t.is(ztunnel.hasEnded, false);
});

test.serial('200 namespaces: one ztunnel after the other serves them all, and nothing is left open', async t => {
	const COUNT = 200;
	const {server, socketPath} = serve(t);
	const namespaces = Array.from({length: COUNT}, () => new TestNetns(t));
	const uids = namespaces.map((_, index) => `pod-${index}`);
	const state = () => [readdirSync('/proc/self/fd').length, native.openHandles()];
	const before = state();
	for (const [index, uid] of uids.entries()) {
		server.put(workload(uid, namespaces[index]!.open));
	}

	t.deepEqual(state(), before);
	for (const round of [1, 2]) {
		const ztunnel = startZtunnel(t, socketPath);
		await eventually('it is connected', () => server.connections.length === 1);
		const started = performance.now();
		await eventually('the snapshot is done', () => server.connections[0]!.isSnapshotDone);
		t.log(`ztunnel ${round}: ${COUNT} namespaces in ${(performance.now() - started).toFixed(0)} ms`);
		t.true(uids.every(uid => server.state(uid).kind === 'acknowledged'));
		t.deepEqual(new Set(namespaces.map(netns => reach(netns))), new Set(['ok']));
		ztunnel.child.kill('SIGKILL');
		await once(ztunnel.child, 'close');
		await eventually('it is gone', () => server.connections.length === 0);
		t.deepEqual(new Set(namespaces.map(netns => reach(netns))), new Set(['ECONNREFUSED']));
		t.true(uids.every(uid => server.state(uid).kind === 'acknowledged'));
	}

	const last = startZtunnel(t, socketPath);
	await eventually('the snapshot is done', () => server.connections[0]?.isSnapshotDone === true);
	for (const uid of uids) {
		server.remove(uid);
	}

	await eventually('all are deleted', () => server.counters.sent.delete === COUNT && server.counters.acks === 4 * COUNT + 3);
	t.deepEqual(new Set(namespaces.map(netns => reach(netns))), new Set(['ECONNREFUSED']));
	await last.stop();
	await eventually('it is gone', () => server.connections.length === 0);
	await eventually('nothing is left open', () => isDeepStrictEqual(state(), before)).catch(() => {
		t.deepEqual(state(), before);
	});
});
