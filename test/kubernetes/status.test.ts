import {Buffer} from 'node:buffer';
import {performance} from 'node:perf_hooks';
import {setTimeout as sleep} from 'node:timers/promises';
import test, {type ExecutionContext} from 'ava';
import {readPod, type PodObject} from '../../src/kubernetes/objects.js';
import {EventWriter, REDIRECTION, StatusWriter} from '../../src/kubernetes/status.js';
import {eventually} from '../helpers/process.js';
import {makePod, type ApiObject, type FakeApiServer} from './fake-server.js';
import {checkGaps, makeBench, withoutJitter, type Bench} from './helpers.js';

/** Longer than a test's rounds on a busy machine, but where a test waits for it. */
const SETTLE_MS = 20_000;

interface Desk extends Bench {
	readonly writer: StatusWriter;
	readonly put: (name: string, extra?: object) => PodObject;
	readonly annotation: (name: string) => string | undefined;
	readonly patches: () => readonly unknown[];
}

async function makeDesk(t: ExecutionContext, {settleMs = SETTLE_MS, ...timing}: {readonly settleMs?: number; readonly gapMs?: number; readonly maxBackoffMs?: number} = {}): Promise<Desk> {
	const bench = await makeBench(t, {timing: {requestMs: 20_000, gapMs: 20, maxBackoffMs: 200, ...timing}});
	const {server, client, log, signal} = bench;
	const writer = new StatusWriter({
		client, signal, settleMs,
		log(line) {
			log.push(line);
		},
	});
	return {
		...bench, writer,
		put: (name, extra = {}) => readPod(server.put('pods', makePod(`shop/${name}`, extra)))!,
		annotation: name => server.get('pods', `shop/${name}`)?.metadata.annotations?.[REDIRECTION],
		patches: () => server.history.filter(({method}) => method === 'PATCH'),
	};
}

const settled = async ({writer}: Desk) => eventually('no wish is left', () => writer.pending === 0);

test('the annotation is written, changed and taken away, by a patch of the status with the uid', async t => {
	const desk = await makeDesk(t);
	const {writer, put, annotation, server} = desk;
	const pod = put('web', {annotations: {'prometheus.io/scrape': 'true'}});
	writer.set(pod, 'pending');
	await settled(desk);
	t.is(annotation('web'), 'pending');
	t.deepEqual(server.history.map(({method, path, body}) => [method, path, body]), [
		['PATCH', '/api/v1/namespaces/shop/pods/web/status', {metadata: {uid: pod.uid, annotations: {[REDIRECTION]: 'pending'}}}],
	]);
	writer.set(pod, 'enabled');
	await settled(desk);
	t.is(annotation('web'), 'enabled');
	writer.set(readPod(server.get('pods', 'shop/web'))!, undefined);
	await settled(desk);
	t.deepEqual(server.get('pods', 'shop/web')!.metadata.annotations, {'prometheus.io/scrape': 'true'});
	t.deepEqual(writer.counters, {written: 3, failed: 0, dropped: 0});
});

test('what is so already is not written, nor what was written a moment ago', async t => {
	const desk = await makeDesk(t);
	const {writer, put, patches} = desk;
	const pod = put('web');
	writer.set(pod, undefined);
	writer.set(put('other', {annotations: {[REDIRECTION]: 'enabled'}}), 'enabled');
	await sleep(30);
	t.is(patches().length, 0);
	for (let round = 0; round < 20; round++) {
		// As a control loop does, that has not seen its own write yet.
		writer.set(pod, 'enabled');
		await sleep(2);
	}

	await settled(desk);
	writer.set(pod, 'enabled');
	await settled(desk);
	t.is(patches().length, 1);
});

test('an annotation that somebody else changed is put back', async t => {
	const settleMs = 100;
	const desk = await makeDesk(t, {settleMs});
	const {writer, put, annotation} = desk;
	writer.set(put('web'), 'enabled');
	await settled(desk);
	const changed = put('web', {annotations: {[REDIRECTION]: 'disabled'}});
	await sleep(settleMs + 20);
	writer.set(changed, 'enabled');
	await settled(desk);
	t.is(annotation('web'), 'enabled');
});

test('the latest wish counts, with one request for a pod at a time and few at once', async t => {
	const desk = await makeDesk(t);
	const {writer, put, annotation, patches, client} = desk;
	const pods = Array.from({length: 30}, (_, index) => put(`web-${index}`));
	await client.get('/api/v1/pods');
	for (const pod of pods) {
		writer.set(pod, 'pending');
		writer.set(pod, undefined);
		writer.set(pod, 'enabled');
	}

	await settled(desk);
	t.true(pods.every(({name}) => annotation(name) === 'enabled'));
	t.true(patches().length <= 30 + 4, String(patches().length));
	t.true(desk.server.connections <= 5, String(desk.server.connections));
});

test('another pod of the same name is left alone', async t => {
	const desk = await makeDesk(t);
	const {writer, put, annotation, log} = desk;
	const pod = put('web', {uid: 'old'});
	put('web', {uid: 'new'});
	writer.set(pod, 'enabled');
	await settled(desk);
	t.is(annotation('web'), undefined);
	t.deepEqual([writer.counters, log], [{written: 0, failed: 0, dropped: 1}, []]);
});

test('a pod that is gone is forgotten without a word', async t => {
	const desk = await makeDesk(t);
	const {writer, put, server, log} = desk;
	const pod = put('web');
	server.delete('pods', 'shop/web');
	writer.set(pod, 'enabled');
	await settled(desk);
	t.deepEqual([writer.counters, log], [{written: 0, failed: 0, dropped: 1}, []]);
});

test('a conflict with somebody else\'s write is no reason to give up', async t => {
	const desk = await makeDesk(t);
	const {writer, put, server, annotation} = desk;
	let conflicts = 0;
	server.behave({
		status: 409,
		applies({method}) {
			return method === 'PATCH' && conflicts++ < 3;
		},
	});
	writer.set(put('web'), 'enabled');
	await settled(desk);
	t.is(annotation('web'), 'enabled');
	t.is(writer.counters.failed, 3);
});

test('while the server fails, wishes stand, at one request a gap; each thing is logged once', async t => {
	const gapMs = 40;
	const desk = await makeDesk(t, {gapMs, maxBackoffMs: 100});
	const {writer, put, server, annotation, log} = desk;
	const pods = Array.from({length: 20}, (_, index) => put(`web-${index}`));
	await desk.client.get('/api/v1/pods');
	server.behave({status: 500});
	const started = performance.now();
	for (const pod of pods) {
		writer.set(pod, 'pending');
	}

	await eventually('some attempts', () => server.requests('', started).length >= 5);
	for (const pod of pods) {
		writer.set(pod, 'enabled');
	}

	writer.forget(pods[0]!.uid);
	const requests = server.requests('', started).length;
	t.true(requests <= 4 + (performance.now() - started) / gapMs, String(requests));
	t.is(log.length, 1, log.join('\n'));
	server.behave();
	await settled(desk);
	t.is(annotation('web-0'), undefined);
	t.true(pods.slice(1).every(({name}) => annotation(name) === 'enabled'));
});

test('one pod that is always refused does not keep the others waiting', async t => {
	const desk = await makeDesk(t);
	const {writer, put, server, annotation} = desk;
	server.behave({
		status: 400,
		applies({path}) {
			return path.includes('/bad/');
		},
	});
	const bad = put('bad');
	writer.set(bad, 'enabled');
	const pods = Array.from({length: 10}, (_, index) => put(`web-${index}`));
	for (const pod of pods) {
		writer.set(pod, 'enabled');
	}

	await eventually('all others', () => pods.every(({name}) => annotation(name) === 'enabled'));
	await eventually('only that one is left', () => writer.pending === 1);
	writer.forget(bad.uid);
	t.is(writer.pending, 0);
});

test.serial('what the server forbids is tried ever more rarely, and does not slow others down', async t => {
	withoutJitter(t);
	const [gapMs, atOnce] = [20, 4];
	const desk = await makeDesk(t, {gapMs, maxBackoffMs: 2000});
	const {writer, put, server, log, client} = desk;
	server.behave({
		status: 403,
		applies({method}) {
			return method === 'PATCH';
		},
	});
	for (let index = 0; index < 50; index++) {
		writer.set(put(`web-${index}`), 'enabled');
	}

	await eventually('some attempts', () => server.history.length >= 11);
	// The first ones together are one failure at least, and so is each one after them.
	checkGaps(t, server, atOnce + 1, index => gapMs * 2 ** (index - atOnce) / 2);
	t.true(client.pace.isHealthy);
	t.is(log.length, 1);
	t.regex(log[0]!, /^the annotation of pods: the API server did not patch pods\/status .*403.*allow the verb `patch` on `pods\/status`/);
});

async function makeReporter(t: ExecutionContext, options: {readonly silenceMs?: number} = {}): Promise<Bench & {readonly events: EventWriter}> {
	const bench = await makeBench(t, {timing: {requestMs: 20_000, gapMs: 10, maxBackoffMs: 50}});
	const {client, signal, log} = bench;
	const events = new EventWriter({
		client, signal, ...options,
		log(line) {
			log.push(line);
		},
	}, 'node-1');
	return {...bench, events};
}

const POD = {namespace: 'shop', name: 'web-0', uid: 'u1'};
const REFUSED = {type: 'Warning', reason: 'CaptureRefused', message: 'annotation x cannot be read'} as const;
const written = (server: FakeApiServer) => server.events as readonly ApiObject[] as ReadonlyArray<ApiObject & Readonly<Record<'note' | 'reason' | 'eventTime', string>>>;

test('an event has what the API asks for', async t => {
	const {events, server} = await makeReporter(t);
	events.report(POD, REFUSED);
	await eventually('it is there', () => server.events.length === 1);
	const [event] = written(server);
	const {metadata: {name, ...metadata}, eventTime, ...rest} = event!;
	t.deepEqual({metadata, ...rest} as object, {
		apiVersion: 'events.k8s.io/v1', kind: 'Event', metadata: {namespace: 'shop'}, reportingController: 'sidestep', reportingInstance: 'node-1', action: 'Capture',
		reason: 'CaptureRefused', type: 'Warning', note: 'annotation x cannot be read', regarding: {apiVersion: 'v1', kind: 'Pod', namespace: 'shop', name: 'web-0', uid: 'u1'},
	});
	t.regex(name, /^web-0\.[\da-f]{16}$/);
	t.regex(eventTime, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$/);
	t.is(server.history[0]!.path, '/apis/events.k8s.io/v1/namespaces/shop/events');
});

test('long names and messages are cut to what the API takes, between characters', async t => {
	const {events, server} = await makeReporter(t);
	events.report({...POD, name: `${'a'.repeat(235)}-${'b'.repeat(17)}`}, {...REFUSED, message: '🦀'.repeat(1000)});
	await eventually('it is there', () => server.events.length === 1);
	const {metadata, note} = written(server)[0]!;
	t.true(metadata.name.length <= 253);
	t.regex(metadata.name, /a\.[\da-f]{16}$/);
	t.true(Buffer.byteLength(note) <= 1024 && Buffer.byteLength(note) > 1000);
	t.regex(note, /^🦀+…$/u);
});

test('the same event comes once an hour, another one at once', async t => {
	const silenceMs = 2000;
	const {events, server} = await makeReporter(t, {silenceMs});
	for (let index = 0; index < 10; index++) {
		events.report(POD, REFUSED);
	}

	events.report({...POD, uid: 'u2'}, REFUSED);
	events.report(POD, {...REFUSED, message: 'another'});
	t.is(events.pending, 3);
	await eventually('they are written', () => events.counters.written === 3);
	await sleep(silenceMs);
	events.report(POD, REFUSED);
	await eventually('it is written again', () => events.counters.written === 4);
	t.is(server.events.length, 4);
});

test('while the server fails, events wait, up to a bound; then the oldest are lost', async t => {
	const {events, server, log} = await makeReporter(t);
	server.behave({status: 503});
	for (let index = 0; index < 1000; index++) {
		events.report(POD, {...REFUSED, message: String(index)});
	}

	t.is(events.pending, 256);
	await eventually('some attempts', () => server.history.length >= 3);
	t.is(log.length, 1);
	server.behave();
	await eventually('the queue is empty', () => events.pending === 0);
	t.deepEqual([events.counters.written, events.counters.lost, written(server).at(-1)!.note], [256, 744, '999']);
});

test('an event that the server does not want is lost, and not tried again in the next round', async t => {
	const {events, server, log} = await makeReporter(t);
	server.behave({status: 403});
	events.report(POD, REFUSED);
	await eventually('it is lost', () => events.counters.lost === 1);
	for (let round = 0; round < 20; round++) {
		events.report(POD, REFUSED);
		await sleep(5);
	}

	t.deepEqual([server.history.length, events.counters.lost, events.pending, log.length], [1, 1, 0, 1]);
	t.regex(log[0]!, /allow the verb `create` on `events`/);
});

test('an answer that was lost makes no second event', async t => {
	const {events, server} = await makeReporter(t);
	events.report(POD, REFUSED);
	await eventually('it is there', () => server.events.length === 1);
	// What comes to the same: the name exists already.
	server.behave({
		status: 409,
		applies() {
			return true;
		},
	});
	events.report(POD, {...REFUSED, message: 'another'});
	await eventually('it is done', () => events.pending === 0);
	t.deepEqual(events.counters, {written: 2, failed: 0, lost: 0});
});

test('when stopped, nobody writes any more', async t => {
	const desk = await makeDesk(t);
	const {events, stop, server} = await makeReporter(t);
	desk.stop();
	desk.writer.set(desk.put('web'), 'enabled');
	stop();
	events.report(POD, REFUSED);
	await sleep(50);
	t.is(desk.server.history.length + server.history.length, 0);
});
