/** The protocol, as a peer of bytes sees it. */
import {existsSync, lstatSync, readdirSync, renameSync, rmSync, unlinkSync, writeFileSync} from 'node:fs';
import path from 'node:path';
import {setTimeout as sleep} from 'node:timers/promises';
import test, {type ExecutionContext} from 'ava';
import {HostError, PodError} from '../../src/errors.js';
import {native} from '../../src/native.js';
import {ZdsServer, type ZdsServerOptions} from '../../src/zds/server.js';
import {eventually} from '../helpers/process.js';
import {TestNetns, directoryOf, serve as serveAlone, workload, type Served} from './helpers.js';
import {ACK, HELLO, Peer, SNAPSHOT_SENT, add, del, keep, nack} from './peer.js';

type Writable<Type> = {-readonly [Key in keyof Type]: Type[Key]};

interface Fixture extends Served {
	connect(): Peer;
}

function serve(t: ExecutionContext, options: Partial<ZdsServerOptions> = {}): Fixture {
	const served = serveAlone(t, options);
	return {...served, connect: () => Peer.connect(t, served.socketPath)};
}

test.serial('a snapshot: Add for each workload, Keep where the namespace is not known, then its end', async t => {
	const {server, connect, changes} = serve(t);
	const netns = new TestNetns(t);
	server.put(workload('a', netns.open));
	server.put(workload('b', () => undefined));
	server.put(workload('c', netns.open));
	t.deepEqual(server.state('a'), {kind: 'waiting', why: 'no ztunnel is connected'});
	t.deepEqual(server.state('b'), {kind: 'waiting', why: 'its network namespace is not known'});

	const peer = connect();
	peer.send(HELLO);
	t.is(await peer.next(), add('a'));
	t.is(await peer.next(100), undefined, 'one request is outstanding at a time');
	t.deepEqual(server.state('a'), {kind: 'waiting', why: 'ztunnel has not answered yet'});
	t.false(server.connections[0]!.isSnapshotDone);
	peer.send(ACK);
	t.is(await peer.next(), keep('b'));
	t.deepEqual(server.state('a'), {kind: 'acknowledged'});
	peer.send(ACK);
	t.deepEqual(await peer.answer(SNAPSHOT_SENT), [add('c'), SNAPSHOT_SENT]);
	await eventually('the snapshot is done', () => server.connections[0]!.isSnapshotDone);
	t.deepEqual(server.state('b'), {kind: 'waiting', why: 'its network namespace is not known'});
	t.deepEqual(changes, ['a acknowledged', 'c acknowledged']);
	t.like(server.connections[0], {pid: process.pid, isCurrent: true});
	t.like(server.counters, {connections: 1, sent: {add: 2, keep: 1, delete: 0, snapshot: 1}, acks: 4, nacks: 0});
});

test.serial('after the snapshot: Add and Del as workloads change, nothing for what is the same, Add for another namespace of the same pod', async t => {
	const {server, connect, changes} = serve(t);
	const netns = [new TestNetns(t), new TestNetns(t)] as const;
	const peer = connect();
	t.deepEqual(await peer.snapshot(), [SNAPSHOT_SENT]);

	server.put(workload('a', netns[0].open));
	t.deepEqual(await peer.answer(add('a')), [add('a')]);
	t.deepEqual(await server.settled('a', 30_000), {kind: 'acknowledged'});
	server.put(workload('a', netns[0].open));
	server.put(workload('a', () => undefined));
	t.deepEqual(server.state('a'), {kind: 'acknowledged'});
	server.put(workload('a', netns[1].open));
	t.deepEqual(server.state('a'), {kind: 'waiting', why: 'ztunnel has not answered yet'});
	t.deepEqual(await peer.answer(add('a')), [add('a')]);
	t.deepEqual(await server.settled('a', 30_000), {kind: 'acknowledged'});
	server.remove('a');
	server.remove('a');
	server.put(workload('b', netns[0].open));
	t.deepEqual(await peer.answer(add('b')), [del('a'), add('b')]);
	t.deepEqual(server.state('a'), {kind: 'waiting', why: 'the workload is not there'});
	t.is(await peer.next(100), undefined);
	t.deepEqual(changes, ['a acknowledged', 'a waiting', 'a acknowledged', 'b acknowledged']);
	t.like(server.counters, {sent: {add: 3, keep: 0, delete: 1, snapshot: 1}, acks: 5});
});

test.serial('what changes during a snapshot is right at its end, and Del comes after it', async t => {
	const {server, connect} = serve(t);
	const netns = [new TestNetns(t), new TestNetns(t)] as const;
	for (const uid of ['told', 'outstanding', 'untold', 'replaced']) {
		server.put(workload(uid, netns[0].open));
	}

	const peer = connect();
	peer.send(HELLO);
	t.is(await peer.next(), add('told'));
	peer.send(ACK);
	t.is(await peer.next(), add('outstanding'));
	server.remove('told');
	server.remove('outstanding');
	server.remove('untold');
	server.put(workload('new', netns[0].open));
	peer.send(ACK);
	t.is(await peer.next(), add('replaced'));
	server.put(workload('replaced', netns[1].open));
	peer.send(ACK);
	t.deepEqual(await peer.answer(SNAPSHOT_SENT), [add('new'), add('replaced'), SNAPSHOT_SENT]);
	t.deepEqual(await peer.answer(del('outstanding')), [del('told'), del('outstanding')]);
	t.deepEqual(server.state('replaced'), {kind: 'acknowledged'});
	t.is(await peer.next(100), undefined);
});

test.serial('a workload that comes back while its Add or Del is outstanding ends as it is wanted', async t => {
	const {server, connect} = serve(t);
	const netns = new TestNetns(t);
	const peer = connect();
	await peer.snapshot();
	server.put(workload('a', netns.open));
	t.is(await peer.next(), add('a'));
	server.remove('a');
	server.put(workload('a', netns.open));
	peer.send(ACK);
	t.is(await peer.next(), add('a'));
	t.is(server.state('a').kind, 'waiting', 'the first answer was about what is not wanted any more');
	server.remove('a');
	peer.send(ACK);
	t.is(await peer.next(), del('a'));
	server.put(workload('a', netns.open));
	peer.send(ACK);
	t.deepEqual(await peer.answer(add('a')), [add('a')]);
	t.deepEqual(await server.settled('a', 30_000), {kind: 'acknowledged'});
	t.is(await peer.next(100), undefined);
});

test.serial('a namespace that was not known is told of when it is', async t => {
	const {server, connect} = serve(t);
	const netns = new TestNetns(t);
	server.put(workload('a', () => undefined));
	const peer = connect();
	t.deepEqual(await peer.snapshot(), [keep('a'), SNAPSHOT_SENT]);
	server.put(workload('b', () => undefined));
	const started = performance.now();
	t.deepEqual(await server.settled('b', 60_000), {kind: 'waiting', why: 'its network namespace is not known'});
	t.true(performance.now() - started < 30_000, 'nobody will answer');
	t.is(await peer.next(100), undefined, 'no Keep after the snapshot: ztunnel would exit');
	server.put(workload('a', netns.open));
	server.put(workload('b', netns.open));
	t.deepEqual(await peer.answer(add('b')), [add('a'), add('b')]);
	t.is((await server.settled('b', 30_000)).kind, 'acknowledged');

	// It is known when the workload is put, and not when it is sent; and then it is again.
	let isKnown = true;
	const flickers = workload('c', () => isKnown ? netns.open() : undefined);
	peer.close();
	await eventually('the peer is gone', () => server.connections.length === 0);
	server.put(flickers);
	isKnown = false;
	const second = connect();
	t.deepEqual(await second.snapshot(), [add('a'), add('b'), keep('c'), SNAPSHOT_SENT]);
	isKnown = true;
	server.put(flickers);
	t.deepEqual(await second.answer(add('c')), [add('c')]);
});

test.serial('a namespace with the inode of the one before is another one: what was said of that does not hold', async t => {
	const {server, connect, changes} = serve(t);
	const peer = connect();
	await peer.snapshot();
	// Which inode the kernel gives out next is chance: one of many is enough.
	for (let batch = 0; batch < 50; batch++) {
		const former = new Map<bigint, string>();
		const opened = Array.from({length: 30}, () => new TestNetns(t));
		for (const [index, {open, netns}] of opened.entries()) {
			const uid = `${batch}-${index}`;
			former.set(netns.inode, uid);
			server.put(workload(uid, open));
			await peer.answer(add(uid));
			t.is((await server.settled(uid, 30_000)).kind, 'acknowledged');
		}

		for (const netns of opened) {
			netns.close();
		}

		const others: TestNetns[] = [];
		while (others.length < 50) {
			const netns = new TestNetns(t);
			const uid = former.get(netns.netns.inode);
			if (uid !== undefined) {
				server.put(workload(uid, netns.open));
				t.deepEqual(server.state(uid), {kind: 'waiting', why: 'ztunnel has not answered yet'});
				t.deepEqual(await peer.answer(add(uid)), [add(uid)]);
				t.deepEqual(await server.settled(uid, 30_000), {kind: 'acknowledged'});
				t.deepEqual(changes.slice(-2), [`${uid} waiting`, `${uid} acknowledged`]);
				return;
			}

			others.push(netns);
			// Dead ones are taken apart in the background.
			await sleep(10);
		}

		for (const netns of others) {
			netns.close();
		}
	}

	t.fail('no inode was given out again');
});

test.serial('a new namespace that cannot be opened when it is to be told of: the word about the one before does not hold for it', async t => {
	const {server, connect} = serve(t);
	const [first, second] = [new TestNetns(t), new TestNetns(t)] as const;
	const peer = connect();
	await peer.snapshot();
	server.put(workload('a', first.open));
	await peer.answer(add('a'));
	t.is((await server.settled('a', 30_000)).kind, 'acknowledged');
	const known = workload('a', second.open);
	server.put({...known, openNetns: () => undefined});
	t.deepEqual(await server.settled('a', 30_000), {kind: 'waiting', why: 'its network namespace is not known'});
	server.put(known);
	t.deepEqual(await peer.answer(add('a')), [add('a')]);
	t.deepEqual(await server.settled('a', 30_000), {kind: 'acknowledged'});
});

test.serial('while it is held: pods as they are put, no end of the snapshot, so no Del either; then all that ends a snapshot', async t => {
	const {server, connect} = serve(t, {isHeld: true});
	const netns = new TestNetns(t);
	const early = connect();
	early.send(HELLO);
	t.is(await early.next(200), undefined, 'nothing is known yet');
	server.put(workload('a', netns.open));
	server.put(workload('b', netns.open));
	server.put(workload('kept', () => undefined));
	t.deepEqual(await early.answer(keep('kept')), [add('a'), add('b'), keep('kept')]);
	t.is((await server.settled('a', 30_000)).kind, 'acknowledged', 'pods that are looked at start before');
	server.remove('a');
	t.is(await early.next(200), undefined);
	t.deepEqual(server.connections.map(({isSnapshotDone}) => isSnapshotDone), [false]);
	const silent = connect();

	server.release();
	t.deepEqual(await early.answer(del('a')), [SNAPSHOT_SENT, del('a')]);
	t.is(await early.next(100), undefined);
	t.is(await silent.next(100), undefined, 'it has not said hello');
	t.deepEqual(await silent.snapshot(), [add('b'), keep('kept'), SNAPSHOT_SENT]);
	t.deepEqual(await connect().snapshot(), [add('b'), keep('kept'), SNAPSHOT_SENT]);
	server.put(workload('c', netns.open));
	t.is(server.counters.sent.snapshot, 3);
});

test.serial('who waits in a held snapshot is not dropped for it', async t => {
	const {server, connect} = serve(t, {isHeld: true, ackTimeoutMs: 500});
	const peer = connect();
	peer.send(HELLO);
	await eventually('hello', () => server.connections.some(({isCurrent}) => isCurrent));
	await sleep(1500);
	t.is(server.connections.length, 1);
	server.release();
	t.deepEqual(await peer.answer(SNAPSHOT_SENT), [SNAPSHOT_SENT]);
});

test.serial('a nack is the workload\'s own: the others go on, and putting it again asks again', async t => {
	const {server, connect, changes, lines} = serve(t);
	const netns = new TestNetns(t);
	for (const uid of ['a', 'b']) {
		server.put(workload(uid, netns.open));
	}

	const peer = connect();
	peer.send(HELLO);
	t.is(await peer.next(), add('a'));
	peer.send(nack('failed to\n bind'));
	t.deepEqual(await peer.answer(SNAPSHOT_SENT), [add('b'), SNAPSHOT_SENT]);
	t.deepEqual(await server.settled('a', 30_000), {kind: 'refused', error: 'failed to bind'});
	t.is((await server.settled('b', 30_000)).kind, 'acknowledged');
	t.true(lines.includes(`ztunnel (pid ${process.pid}) refused pod shop/name-a (failed to bind): it tries again by itself`), lines.join('\n'));

	for (const answer of [nack('failed to bind'), nack('another'), ACK]) {
		server.put(workload('a', netns.open));
		t.is(server.state('a').kind, 'refused', 'the last word stands until the next');
		const settled = server.settled('a', 30_000);
		t.is(await peer.next(), add('a'));
		peer.send(answer);
		t.is((await settled).kind, answer === ACK ? 'acknowledged' : 'refused');
	}

	t.deepEqual(changes, ['a refused', 'b acknowledged', 'a refused', 'a acknowledged']);
	t.like(server.counters, {nacks: 3, acks: 3});

	server.put(workload('c', netns.open));
	t.is(await peer.next(), add('c'));
	peer.send(nack('no'));
	await server.settled('c', 30_000);
	server.remove('c');
	t.deepEqual(await peer.answer(del('c')), [del('c')], 'ztunnel would try it again for ever');
});

test.serial('who does not answer in time is dropped, and the next one is told all', async t => {
	const ackTimeoutMs = 1000;
	const {server, connect, lines} = serve(t, {ackTimeoutMs});
	const netns = new TestNetns(t);
	server.put(workload('a', netns.open));
	for (const answers of [0, 1]) {
		const peer = connect();
		peer.send(HELLO);
		t.is(await peer.next(), add('a'));
		for (let i = 0; i < answers; i++) {
			peer.send(ACK);
			t.is(await peer.next(), SNAPSHOT_SENT);
		}

		t.is(await peer.next(), '');
		t.is(server.counters.dropped.unanswered, answers + 1);
	}

	t.true(lines.includes(`ztunnel (pid ${process.pid}) was dropped: it did not answer "add" of workload a in ${ackTimeoutMs} ms`), lines.join('\n'));
	t.true(lines.includes(`ztunnel (pid ${process.pid}) was dropped: it did not answer "snapshot" in ${ackTimeoutMs} ms`), lines.join('\n'));
	t.deepEqual(await connect().snapshot(), [add('a'), SNAPSHOT_SENT]);
});

test.serial('of two ztunnels the newer gets Add, both get Del; when it dies the older gets what it lacks', async t => {
	const {server, connect} = serve(t);
	const netns = [new TestNetns(t), new TestNetns(t)] as const;
	for (const uid of ['stays', 'goes', 'moves']) {
		server.put(workload(uid, netns[0].open));
	}

	const older = connect();
	t.deepEqual(await older.snapshot(), [add('stays'), add('goes'), add('moves'), SNAPSHOT_SENT]);
	const newer = connect();
	t.deepEqual(await newer.snapshot(), [add('stays'), add('goes'), add('moves'), SNAPSHOT_SENT]);
	await eventually('both have their snapshot', () => server.connections.every(({isSnapshotDone}) => isSnapshotDone));
	t.deepEqual(server.connections.map(({isCurrent}) => isCurrent), [false, true]);

	server.put(workload('comes', netns[0].open));
	server.remove('goes');
	server.put(workload('moves', netns[1].open));
	t.deepEqual(await newer.answer(add('moves')), [add('comes'), del('goes'), add('moves')]);
	t.deepEqual(await older.answer(del('moves')), [del('goes'), del('moves')], 'its namespace is dead');
	t.is(await older.next(100), undefined);
	t.deepEqual(await server.settled('moves', 30_000), {kind: 'acknowledged'});

	// Something is outstanding when it dies.
	server.put(workload('late', netns[0].open));
	t.is(await newer.next(), add('late'));
	newer.close();
	const lacking = await older.answer(add('late'));
	t.deepEqual(lacking, [add('moves'), add('comes'), add('late')]);
	t.is(await older.next(100), undefined);
	t.deepEqual(await server.settled('late', 30_000), {kind: 'acknowledged'});
	t.like(server.counters.dropped, {ended: 1});
});

test.serial('two ztunnels in their snapshots at once: both get all', async t => {
	const {server, connect} = serve(t);
	const netns = new TestNetns(t);
	for (const uid of ['a', 'b']) {
		server.put(workload(uid, netns.open));
	}

	const older = connect();
	older.send(HELLO);
	t.is(await older.next(), add('a'));
	const newer = connect();
	newer.send(HELLO);
	t.is(await newer.next(), add('a'));
	server.put(workload('c', netns.open));
	older.send(ACK);
	t.deepEqual(await older.answer(SNAPSHOT_SENT), [add('b'), add('c'), SNAPSHOT_SENT]);
	t.is(server.state('b').kind, 'waiting', 'the older one\'s word does not count');
	newer.send(nack('no'));
	t.deepEqual(await newer.answer(SNAPSHOT_SENT), [add('b'), add('c'), SNAPSHOT_SENT]);
	await server.settled('c', 30_000);
	t.deepEqual(['a', 'b', 'c'].map(uid => server.state(uid).kind), ['refused', 'acknowledged', 'acknowledged']);

	newer.close();
	await eventually('the older one\'s word counts', () => server.state('a').kind === 'acknowledged');
	t.is(await older.next(100), undefined);
});

test.serial('the newest is who said hello last, not who connected last', async t => {
	const {server, connect} = serve(t);
	const netns = new TestNetns(t);
	const [first, second] = [connect(), connect()];
	t.deepEqual(await second.snapshot(), [SNAPSHOT_SENT]);
	t.deepEqual(await first.snapshot(), [SNAPSHOT_SENT]);
	await eventually('both have their snapshot', () => server.connections.every(({isSnapshotDone}) => isSnapshotDone));
	server.put(workload('a', netns.open));
	t.deepEqual(await first.answer(add('a')), [add('a')]);
	t.is(await second.next(100), undefined);
});

test.serial('a verdict stays while no ztunnel is connected, and the next one decides anew', async t => {
	const {server, connect, changes} = serve(t);
	const netns = new TestNetns(t);
	server.put(workload('a', netns.open));
	const first = connect();
	await first.snapshot();
	t.is((await server.settled('a', 30_000)).kind, 'acknowledged');
	first.close();
	await eventually('it is gone', () => server.connections.length === 0);
	t.is(server.state('a').kind, 'acknowledged');
	server.put(workload('b', netns.open));
	t.deepEqual(server.state('b'), {kind: 'waiting', why: 'no ztunnel is connected'});

	const second = connect();
	second.send(HELLO);
	t.is(await second.next(), add('a'));
	t.is(server.state('a').kind, 'acknowledged');
	second.send(nack('no'));
	t.deepEqual(await second.answer(SNAPSHOT_SENT), [add('b'), SNAPSHOT_SENT]);
	t.is(server.state('a').kind, 'refused');
	t.deepEqual(changes, ['a acknowledged', 'a refused', 'b acknowledged']);
});

test.serial('settled: in time, too late, removed meanwhile, closed meanwhile', async t => {
	const {server, connect} = serve(t);
	const netns = new TestNetns(t);
	server.put(workload('a', netns.open));
	t.deepEqual(await server.settled('a', 50), {kind: 'waiting', why: 'no ztunnel is connected'});
	t.deepEqual(await server.settled('unheard of', 30_000), {kind: 'waiting', why: 'the workload is not there'});
	const peer = connect();
	peer.send(HELLO);
	await peer.next();
	t.deepEqual(await server.settled('a', 50), {kind: 'waiting', why: 'ztunnel has not answered yet'});
	const removed = server.settled('a', 30_000);
	server.remove('a');
	t.deepEqual(await removed, {kind: 'waiting', why: 'the workload is not there'});
	server.put(workload('b', netns.open));
	const closed = server.settled('b', 30_000);
	server.close();
	t.deepEqual(await closed, {kind: 'waiting', why: 'no ztunnel is connected'});
	t.is(await peer.next(), '');
});

const OVERSIZED = '00'.repeat(5000);
for (const [reason, why, packets] of [
	['version', 'speaks another version', ['0802']],
	['version', 'says no version', ['1201ff']],
	['malformed', 'says something else than hello', [ACK]],
	['malformed', 'answers garbage', [HELLO, '010203']],
	['malformed', 'answers without an ack', [HELLO, '1200']],
	['malformed', 'answers in the middle of a field', [HELLO, '0a05']],
	['malformed', 'says hello again', [HELLO, HELLO]],
	['oversized', 'says hello at length', [OVERSIZED]],
	['oversized', 'answers at length', [HELLO, OVERSIZED]],
	['unexpected', 'answers twice', [HELLO, ACK, ACK, ACK]],
] as const) {
	test.serial(`a peer that ${why} is dropped (${reason}), and the others go on`, async t => {
		const {server, connect, lines} = serve(t);
		const netns = new TestNetns(t);
		server.put(workload('a', netns.open));
		const good = connect();
		await good.snapshot();
		const bad = connect();
		for (const packet of packets) {
			bad.send(packet);
		}

		while (await bad.next()) {
			// What it was sent before.
		}

		t.is(server.counters.dropped[reason], 1, lines.join('\n'));
		t.is(Object.values(server.counters.dropped).reduce((a, b) => a + b), 1);
		t.true(lines.some(line => line.includes('was dropped: it') || line.includes('was dropped: what it sent')), lines.join('\n'));
		t.log(lines.at(-1));
		server.put(workload('b', netns.open));
		t.deepEqual(await good.answer(add('b')), [add('b')]);
		t.deepEqual(await server.settled('b', 30_000), {kind: 'acknowledged'});
	});
}

test.serial('a peer that says nothing is dropped in time', async t => {
	const ackTimeoutMs = 1000;
	const {server, connect} = serve(t, {ackTimeoutMs});
	const peer = connect();
	t.is(await peer.next(), '');
	t.is(server.counters.dropped.silent, 1);
	const idle = connect();
	await idle.snapshot();
	await sleep(2 * ackTimeoutMs);
	t.is(server.connections.length, 1, 'one that was told all need not say anything');
});

test.serial('a peer that answers without reading is dropped when its buffer is full', async t => {
	const {server, connect} = serve(t);
	const netns = new TestNetns(t);
	const peer = connect();
	await peer.snapshot();
	for (let i = 0; i < 2000; i++) {
		server.put(workload(`w${i}`, netns.open));
	}

	for (let answered = 0; server.counters.dropped.full === 0; answered++) {
		peer.send(ACK);
		await eventually('the next one is sent', () => server.counters.sent.add > answered + 1 || server.connections.length === 0);
	}

	t.log(`after ${server.counters.sent.add} unread packets`);
	t.true(server.counters.sent.add > 50);
	t.is(server.counters.dropped.full, 1);
});

test.serial('a peer that dies with unread packets is gone at once', async t => {
	const {server, connect} = serve(t);
	const netns = new TestNetns(t);
	const peer = connect();
	await peer.snapshot();
	server.put(workload('a', netns.open));
	peer.close();
	await eventually('it is gone', () => server.connections.length === 0);
	t.is(server.counters.dropped.broken, 1);
	t.deepEqual(await connect().snapshot(), [add('a'), SNAPSHOT_SENT]);
});

test.serial('names that are too long are refused before anything is changed', t => {
	const {server} = serve(t);
	const netns = new TestNetns(t);
	t.throws(() => {
		server.put({...workload('a', netns.open), serviceAccount: 'a'.repeat(2000)});
	}, {instanceOf: PodError, message: /service account 2000/});
	t.deepEqual(server.state('a'), {kind: 'waiting', why: 'the workload is not there'});
});

test.serial('the socket is root\'s own; a stale one is replaced; a live one, or anything else, is not', async t => {
	const {server, socketPath, connect} = serve(t);
	t.is(lstatSync(socketPath).mode & 0o777, 0o600);
	const rival = new ZdsServer({socketPath, log() {}});
	const refused = t.throws(() => {
		rival.listen();
	}, {instanceOf: HostError});
	t.is(refused.message, `ztunnel's socket cannot be served at ${socketPath} (bind ${socketPath}: EADDRINUSE: address already in use): stop the other agent that listens there, or remove what is there if it is no socket`);
	t.deepEqual(await connect().snapshot(), [SNAPSHOT_SENT], 'the live one was not harmed');
	await eventually('the probe is gone', () => server.connections.length === 1);

	server.close();
	t.true(lstatSync(socketPath).isSocket());
	t.teardown(() => {
		rival.close();
	});
	rival.listen();
	t.deepEqual(await connect().snapshot(), [SNAPSHOT_SENT]);

	const file = path.join(directoryOf(t), 'file');
	writeFileSync(file, 'precious');
	t.throws(() => {
		new ZdsServer({socketPath: file, log() {}}).listen();
	}, {instanceOf: HostError, message: /EADDRINUSE/});
	t.throws(() => {
		new ZdsServer({socketPath: path.join(file, 'below'), log() {}}).listen();
	}, {instanceOf: HostError, message: /choose another path/});
	t.throws(() => {
		new ZdsServer({socketPath: `${directoryOf(t)}/${'x'.repeat(108)}`, log() {}}).listen();
	}, {instanceOf: HostError, message: /ENAMETOOLONG/});
});

test.serial('a socket that somebody removes is made again, also with its directory; who is connected stays; what somebody puts there instead is left alone, and said', async t => {
	const {server, socketPath, connect, lines} = serve(t, {checkMs: 50});
	const netns = new TestNetns(t);
	const older = connect();
	await older.snapshot();
	for (const remove of [() => {
		unlinkSync(socketPath);
	}, () => {
		rmSync(path.dirname(socketPath), {recursive: true});
	}]) {
		const [before, handles] = [lines.length, native.openHandles()];
		remove();
		await eventually('made again', () => lines.length > before);
		t.is(native.openHandles(), handles);
		t.is(lines.at(-1), `ztunnel's socket ${socketPath} was gone: made again`);
		t.is(lstatSync(socketPath).mode & 0o777, 0o600);
		const newer = connect();
		t.deepEqual(await newer.snapshot(), [SNAPSHOT_SENT]);
		newer.close();
		await eventually('it is gone', () => server.connections.length === 1);
		t.is(server.problem, undefined);
	}

	server.put(workload('a', netns.open));
	t.deepEqual(await older.answer(add('a')), [add('a')]);

	unlinkSync(socketPath);
	const stranger = new ZdsServer({socketPath, log() {}});
	t.teardown(() => {
		stranger.close();
	});
	stranger.listen();
	await eventually('a problem', () => server.problem !== undefined);
	t.is(server.problem, `ztunnel's socket cannot be served at ${socketPath} (bind ${socketPath}: EADDRINUSE: address already in use): stop the other agent that listens there, or remove what is there if it is no socket`);
	const before = lines.filter(line => line === server.problem).length;
	await sleep(300);
	t.deepEqual([before, lines.filter(line => line === server.problem).length], [1, 1], 'said once');
	// It leaves a socket behind that nobody listens at.
	stranger.close();
	await eventually('ours again', () => server.problem === undefined);
	t.deepEqual(await connect().snapshot(), [add('a'), SNAPSHOT_SENT]);

	server.close();
	unlinkSync(socketPath);
	await sleep(300);
	t.false(existsSync(socketPath), 'not after close');
});

test.serial('a directory in which nothing can be made is a problem, until it can', async t => {
	const {server, socketPath, connect} = serve(t, {checkMs: 50});
	const directory = path.dirname(socketPath);
	renameSync(directory, `${directory}-aside`);
	writeFileSync(directory, '');
	await eventually('a problem', () => server.problem !== undefined);
	t.regex(server.problem!, /ENOTDIR/);
	unlinkSync(directory);
	await eventually('no problem', () => server.problem === undefined);
	t.deepEqual(await connect().snapshot(), [SNAPSHOT_SENT]);
});

test.serial('a connection that cannot be used is dropped, counted and said; the next one is served', async t => {
	const {listenSeqpacket} = native;
	let failures = 1;
	let closed = 0;
	(native as Writable<typeof native>).listenSeqpacket = (socketPath, mode, events) => listenSeqpacket(socketPath, mode, {
		...events,
		onConnection(connection) {
			events.onConnection(failures-- > 0 ? {
				peer: connection.peer,
				read() {
					throw new Error('uv_poll_init: ENOMEM: not enough memory');
				},
				send() {},
				close() {
					closed++;
					connection.close();
				},
			} : connection);
		},
	});
	t.teardown(() => {
		(native as Writable<typeof native>).listenSeqpacket = listenSeqpacket;
	});
	const {server, connect, lines, socketPath} = serve(t, {ackTimeoutMs: 500});
	const handles = native.openHandles();
	t.is(await connect().next(), '');
	t.deepEqual(lines, [`a connection to ${socketPath} was dropped (uv_poll_init: ENOMEM: not enough memory): ztunnel connects again by itself`]);
	t.deepEqual([closed, native.openHandles()], [1, handles]);
	t.like(server.counters, {connections: 1, dropped: {broken: 1}});
	t.deepEqual(server.connections, []);
	t.deepEqual(await connect().snapshot(), [SNAPSHOT_SENT]);
	await sleep(1000);
	t.is(server.counters.dropped.silent, 0, 'nothing of it is left');
});

test.serial('peers that are gone at once harm nobody', async t => {
	const {server, connect} = serve(t);
	for (const total of [50, 100, 150, 200]) {
		for (let i = 0; i < 50; i++) {
			const peer = connect();
			if (i % 2 === 0) {
				peer.send(HELLO);
			}

			peer.close();
		}

		await eventually('all were taken and are gone', () => server.counters.connections === total && server.connections.length === 0);
	}

	t.deepEqual(await connect().snapshot(), [SNAPSHOT_SENT]);
});

test.serial('nothing is left open: not by Add, not by nacks, not by dropped peers', async t => {
	const {server, connect} = serve(t);
	const netns = new TestNetns(t);
	const state = () => [readdirSync('/proc/self/fd').length, native.openHandles()];
	const before = state();
	for (let round = 0; round < 20; round++) {
		for (let i = 0; i < 10; i++) {
			server.put(workload(`${round}-${i}`, netns.open));
		}

		const peer = connect();
		peer.send(HELLO);
		await peer.next();
		peer.send([ACK, nack('no'), '010203', OVERSIZED][round % 4]!);
		await peer.next();
		peer.close();
		await eventually('it is gone', () => server.connections.length === 0);
	}

	t.deepEqual(state(), before);
});
