/**
What must not grow, and what must not depend on the clock on the wall. Serial: both are properties of the whole process.
*/
import {getEventListeners} from 'node:events';
import {performance} from 'node:perf_hooks';
import {setTimeout as sleep} from 'node:timers/promises';
import {setFlagsFromString} from 'node:v8';
import {runInNewContext} from 'node:vm';
import test from 'ava';
import {EventWriter, StatusWriter} from '../../src/kubernetes/status.js';
import {eventually} from '../helpers/process.js';
import {makeNamespace, makePod, type Hostility} from './fake-server.js';
import {followNamespaces, followPods, makeBench, untilEqual} from './helpers.js';

setFlagsFromString('--expose-gc');
const collectGarbage = runInNewContext('gc') as () => void;

const TIMING = {requestMs: 60, credentialsMs: 100, gapMs: 2, maxBackoffMs: 8};
const WATCH = {inactivityMs: 60, steadyMs: 10, pageSize: 10};
const HOSTILITIES: ReadonlyArray<Partial<Hostility>> = [
	{closeWatches: true}, {gone: 'http'}, {gone: 'in band'}, {inBandStatus: 500}, {event: 'reset'}, {event: 'half'}, {event: 'garbage'}, {event: 'closed'}, {silent: true}, {reset: true},
	{status: 500}, {status: 403}, {status: 429, retryAfter: '0.01'}, {gonePages: true}, {list: 'no version', gone: 'http'}, {repeats: true},
];

test.serial('nothing grows over hundreds of failures', async t => {
	const bench = await makeBench(t, {timing: TIMING});
	const {server, client, signal} = bench;
	const pods = followPods(bench, WATCH);
	const namespaces = followNamespaces(bench, WATCH);
	const quiet = {client, signal, log() {}, settleMs: 1, silenceMs: 1};
	const writer = new StatusWriter(quiet);
	const events = new EventWriter(quiet, 'node-1');
	for (let index = 0; index < 50; index++) {
		server.put('pods', makePod(`shop/web-${index}`, {uid: `uid-${index}`}));
	}

	const round = async (count: number) => {
		for (const hostility of HOSTILITIES) {
			server.behave(hostility);
			server.put('pods', makePod(`shop/web-${count % 50}`, {uid: `uid-${count}`, ips: [`10.0.0.${count % 250}`]}));
			server.put('pods', makePod(`shop/passing-${count}`, {uid: `passing-${count}`}));
			server.put('namespaces', makeNamespace('shop', {count: String(count)}));
			for (const pod of pods.reflector.items.values()) {
				writer.set(pod, count % 2 ? 'enabled' : 'pending');
			}

			events.report({namespace: 'shop', name: 'web-1', uid: 'uid-1'}, {type: 'Normal', reason: 'Captured', message: 'it is captured'});
			server.endWatches();
			await sleep(25);
			server.delete('pods', `shop/passing-${count}`);
			writer.forget(`passing-${count}`);
		}

		server.behave();
		server.compact();
		await untilEqual(t, server, pods);
		await untilEqual(t, server, namespaces, 'namespaces');
		await eventually('all is written', () => writer.pending === 0 && events.pending === 0 && client.pace.isHealthy && server.openWatches === 2);
		server.history.length = 0;
		server.events.length = 0;
		for (const told of [pods.told, namespaces.told, bench.log]) {
			told.length = 0;
		}

		await sleep(100);
		collectGarbage();
		const resources = process.getActiveResourcesInfo();
		return {
			heap: process.memoryUsage().heapUsed, listeners: getEventListeners(signal, 'abort').length, timers: resources.filter(name => name === 'Timeout').length,
			resources: resources.length, connections: server.openConnections, waiting: client.pace.waiting,
		};
	};

	await round(0);
	await round(1);
	const before = await round(2);
	let after = before;
	for (let count = 3; count < 11; count++) {
		after = await round(count);
	}

	t.log(before, after, `${pods.reflector.counters.watches} watches, ${client.requests} requests`);
	t.true(client.requests > 300, String(client.requests));
	// Two watches with their timers and listeners, idle connections within their bound.
	t.true(after.listeners <= before.listeners + 2 && after.listeners < 12, `listeners: ${before.listeners}, ${after.listeners}`);
	t.true(after.timers <= before.timers + 4, `timers: ${before.timers}, ${after.timers}`);
	t.true(after.resources <= before.resources + 8, `resources: ${before.resources}, ${after.resources}`);
	t.true(after.connections <= 2 + 4, `connections: ${after.connections}`);
	t.is(after.waiting, 0);
	t.true(after.heap < before.heap + (2 << 20), `heap: ${before.heap}, ${after.heap}`);
	bench.stop();
	await eventually('all connections but idle ones end', () => server.openWatches === 0);
	t.is(getEventListeners(signal, 'abort').length, 0);
});

test.serial('the clock on the wall may jump by years, either way', async t => {
	const RealDate = Date;
	const bench = await makeBench(t, {timing: {requestMs: 20_000, credentialsMs: 500, gapMs: 50, maxBackoffMs: 200}});
	const {server, client} = bench;
	const jump = (ms: number) => {
		globalThis.Date = class extends RealDate {
			constructor(...parts: readonly unknown[]) {
				super(...(parts.length === 0 ? [RealDate.now() + ms] : parts) as [number]);
			}

			static override now(): number {
				return RealDate.now() + ms;
			}
		} as DateConstructor;
	};

	t.teardown(() => {
		globalThis.Date = RealDate;
	});
	const pods = followPods(bench, {inactivityMs: 5000, steadyMs: 100});
	await untilEqual(t, server, pods);
	await eventually('it watches', () => server.openWatches === 1);
	const year = 365 * 86_400_000;
	for (const ms of [10 * year, -10 * year, 0]) {
		jump(ms);
		server.put('pods', makePod(`shop/web-${ms > 0 ? 'ahead' : 'behind'}`));
		await untilEqual(t, server, pods);
		await sleep(200);
	}

	t.is(pods.reflector.counters.watches, 1);
	t.is(server.history.length, 2);

	server.behave({status: 503});
	server.resetConnections();
	await eventually('a failure', () => server.history.length >= 4);
	const started = performance.now();
	const before = server.history.length;
	for (let count = 0; count < 20; count++) {
		jump(count % 2 ? -year : year);
		await sleep(30);
	}

	const most = (performance.now() - started) / 50 + 2;
	t.true(server.history.length - before <= most, `${server.history.length - before} requests, at most ${most}`);
	// The last jump was back.
	server.behave();
	server.put('pods', makePod('shop/after'));
	await untilEqual(t, server, pods);
	await eventually('all is well', () => client.pace.isHealthy);
});
