/**
Each thing that an API server or a network can do wrong: no more than one request a gap meanwhile, and the server's state in the cache after it.
*/
import {performance} from 'node:perf_hooks';
import {setTimeout as sleep} from 'node:timers/promises';
import test, {type ExecutionContext} from 'ava';
import type {FailureKind} from '../../src/kubernetes/errors.js';
import {StatusWriter} from '../../src/kubernetes/status.js';
import {eventually} from '../helpers/process.js';
import {makeNamespace, makePod, type FakeApiServer, type Hostility} from './fake-server.js';
import {followNamespaces, followPods, makeBench, untilEqual, type Bench} from './helpers.js';

/** No back-off that grows: the pace alone has to hold. */
const TIMING = {requestMs: 1500, credentialsMs: 3000, gapMs: 200, maxBackoffMs: 20};
const WATCH = {inactivityMs: 1500, steadyMs: 200, pageSize: 7};

/** Changes of all kinds, some of them in one turn. */
function change(server: FakeApiServer, round: number): void {
	server.put('pods', makePod(`shop/web-${round % 10}`, {ips: [`10.0.1.${round % 250}`]}));
	server.put('pods', makePod(`shop/new-${round}`, {labels: {round: String(round)}}));
	if (round % 3 === 0) {
		server.delete('pods', `shop/web-${(round + 5) % 10}`);
	}

	if (round % 4 === 0) {
		// The same name, another pod.
		server.put('pods', makePod(`shop/web-${(round + 1) % 10}`, {uid: `uid-${round}`}));
	}

	server.put('namespaces', makeNamespace('shop', {round: String(round)}));
}

async function followed(t: ExecutionContext): Promise<Bench & {readonly pods: ReturnType<typeof followPods>; readonly namespaces: ReturnType<typeof followNamespaces>}> {
	const bench = await makeBench(t, {timing: TIMING});
	const {server} = bench;
	for (let index = 0; index < 20; index++) {
		server.put('pods', makePod(`shop/web-${index}`, {ips: [`10.0.0.${index}`]}));
	}

	server.put('namespaces', makeNamespace('shop'));
	const pods = followPods(bench, WATCH);
	const namespaces = followNamespaces(bench, WATCH);
	await untilEqual(t, server, pods);
	await untilEqual(t, server, namespaces, 'namespaces');
	await eventually('both watches', () => server.openWatches === 2);
	return {...bench, pods, namespaces};
}

/** A request a gap, by the server's own log. Both watches may fail before either is known to. */
function checkPace(t: ExecutionContext, server: FakeApiServer, fromMs: number): void {
	const requests = server.requests('', fromMs).length;
	const most = (performance.now() - fromMs) / TIMING.gapMs + 2;
	t.true(requests <= most, `${requests} requests, at most ${most}`);
}

// First and alone: where all of them share a busy machine, a flood may look like a trickle.
test.serial('however a server fails, two reflectors, a writer of annotations and single requests together ask it once a gap', async t => {
	const {server, pods, client, signal} = await followed(t);
	const writer = new StatusWriter({client, signal, log() {}});
	const hostilities: ReadonlyArray<Partial<Hostility>> = [
		{closeWatches: true}, {gone: 'http'}, {gone: 'in band'}, {inBandStatus: 500}, {status: 500}, {reset: true}, {list: 'garbage', gone: 'http'}, {event: 'reset'},
	];
	for (const [index, hostility] of hostilities.entries()) {
		server.behave(hostility);
		const failures = Object.values(pods.reflector.counters.errors).reduce((sum, count) => sum + count);
		change(server, index);
		server.endWatches();
		await eventually('it fails', () => Object.values(pods.reflector.counters.errors).reduce((sum, count) => sum + count) > failures);
		const started = performance.now();
		for (const pod of pods.reflector.items.values()) {
			writer.set(pod, index % 2 ? 'enabled' : 'pending');
		}

		const singles = Promise.allSettled(Array.from({length: 3}, async () => client.get('/api/v1/namespaces/shop/pods/web-1', {signal})));
		await sleep(1000);
		checkPace(t, server, started);
		server.behave();
		await singles;
		await untilEqual(t, server, pods);
		await eventually('all is well', () => client.pace.isHealthy && server.openWatches === 2 && writer.pending === 0);
	}
});

const survived = test.macro({
	async exec(t, hostility: Partial<Hostility> | 'away', errors: readonly FailureKind[], {isPaced = true, breakWatches = false} = {}) {
		const {server, pods, namespaces, client, log} = await followed(t);
		const started = performance.now();
		if (hostility === 'away') {
			await server.stop();
		} else {
			server.behave(hostility);
		}

		for (let round = 0; round < 10; round++) {
			change(server, round);
			if (breakWatches && round === 0) {
				server.endWatches();
				server.compact();
			}

			await sleep(150);
		}

		await eventually(`failures of the kinds ${errors.join(', ')}`, () => errors.every(kind => pods.reflector.counters.errors[kind] > 0));
		if (isPaced) {
			checkPace(t, server, started);
		}

		if (hostility === 'away') {
			server.compact();
			await server.listen();
		} else {
			server.behave();
		}

		await untilEqual(t, server, pods);
		await untilEqual(t, server, namespaces, 'namespaces');
		// And it goes on following.
		change(server, 100);
		await untilEqual(t, server, pods);
		await untilEqual(t, server, namespaces, 'namespaces');
		await eventually('all is well', () => client.pace.isHealthy);
		t.is(client.pace.waiting, 0);
		t.true(log.length < 60, log.join('\n'));
	},
	title: (title = '') => `survived: ${title}`,
});

test('every watch is ended at once', survived, {closeWatches: true}, ['closed_early'], {breakWatches: true});
test('every watch is answered with 410', survived, {gone: 'http'}, ['gone'], {breakWatches: true});
test('every watch says 410 in an event', survived, {gone: 'in band'}, ['gone'], {breakWatches: true});
test('410 for every page but the first', survived, {gonePages: true}, ['gone'], {breakWatches: true});
test('every watch begins with an error event', survived, {inBandStatus: 500}, ['server'], {breakWatches: true});
test('connections are reset in the middle of events', survived, {event: 'reset'}, ['connection']);
test('half an event, then silence', survived, {event: 'half'}, ['timeout']);
test('half an event, then the end', survived, {event: 'closed'}, ['protocol']);
test('garbage between events', survived, {event: 'garbage'}, ['protocol']);
test('a line without end', survived, {event: 'endless'}, ['protocol']);
test('events come twice, and old ones again', survived, {repeats: true}, [], {isPaced: false});
test('events come in the wrong order', survived, {shuffled: true, repeats: true}, [], {isPaced: false});
test('events come in single bytes', survived, {trickleBytes: 1}, [], {isPaced: false});
test('connections are taken and nothing is answered', survived, {silent: true}, ['timeout'], {breakWatches: true});
test('connections are reset before an answer', survived, {reset: true}, ['connection'], {breakWatches: true});
test('500', survived, {status: 500}, ['server'], {breakWatches: true});
test('429 with Retry-After', survived, {status: 429, retryAfter: '0.1'}, ['server'], {breakWatches: true});
test('403', survived, {status: 403}, ['refused'], {breakWatches: true});
test('lists that are none', survived, {list: 'garbage', gone: 'http'}, ['protocol'], {breakWatches: true});
test('lists without a version', survived, {list: 'no version', gone: 'http'}, ['protocol'], {breakWatches: true});
test('lists whose pages do not end', survived, {list: 'pages without end', gone: 'http'}, ['protocol'], {breakWatches: true});
test('away, and all versions are compacted when it is back', survived, 'away', ['connection']);
