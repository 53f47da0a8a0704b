import {performance} from 'node:perf_hooks';
import {setTimeout as sleep} from 'node:timers/promises';
import test from 'ava';
import {keyOf, readMetadata, readNamespace, readPod} from '../../src/kubernetes/objects.js';
import {Reflector} from '../../src/kubernetes/reflector.js';
import {eventually} from '../helpers/process.js';
import {makeNamespace, makePod, type ApiObject} from './fake-server.js';
import {FAST_WATCH, checkGaps, followNamespaces, followPods, makeBench, untilEqual, untilSteady, withoutJitter} from './helpers.js';

test('lists in pages, then follows', async t => {
	const bench = await makeBench(t);
	const {server} = bench;
	for (let index = 0; index < 25; index++) {
		server.put('pods', makePod(`shop/web-${index}`, {ips: [`10.0.0.${index}`]}));
	}

	server.put('pods', makePod('shop/elsewhere', {nodeName: 'node-2'}));
	server.put('namespaces', makeNamespace('shop', {'istio.io/dataplane-mode': 'ambient'}));
	const pods = followPods(bench, {pageSize: 10});
	const namespaces = followNamespaces(bench);
	await untilEqual(t, server, pods);
	await untilEqual(t, server, namespaces, 'namespaces');
	t.is(pods.reflector.items.size, 25);
	t.deepEqual([pods.told.length, pods.told[0]!.length], [1, 25]);
	t.is(server.requests('/api/v1/pods').filter(({isWatch}) => !isWatch).length, 3);

	await eventually('both watches', () => server.openWatches === 2);
	server.put('pods', makePod('shop/new'));
	server.delete('pods', 'shop/web-3');
	server.put('namespaces', makeNamespace('shop'));
	await untilEqual(t, server, pods);
	await untilEqual(t, server, namespaces, 'namespaces');
	t.is(pods.reflector.counters.lists, 1);
});

test('told are all keys after the first list, even if there are none; then only what changed in what is kept', async t => {
	const bench = await makeBench(t);
	const {server} = bench;
	const {told, reflector} = followPods(bench);
	await eventually('it is synced', () => reflector.isSynced);
	await eventually('it is told', () => told.length > 0);
	t.deepEqual(told, [[]]);
	await eventually('it watches', () => server.openWatches === 1);
	server.put('pods', makePod('shop/web', {ips: ['10.0.0.1']}));
	await eventually('it is told', () => told.length === 2);
	for (let index = 0; index < 5; index++) {
		// Nobody here reads conditions.
		const pod = makePod('shop/web', {ips: ['10.0.0.1'], annotations: {'example.org/x': String(index)}});
		server.put('pods', {...pod, status: {...pod['status'] as object, conditions: [{type: 'Ready', status: index % 2 ? 'True' : 'False'}]}});
	}

	await eventually('the events are there', () => reflector.counters.events === 6);
	server.put('pods', makePod('shop/web', {ips: ['10.0.0.2']}));
	await eventually('it is told', () => told.length === 3);
	server.delete('pods', 'shop/web');
	await eventually('it is told', () => told.length === 4);
	t.deepEqual(told, [[], ['shop/web'], ['shop/web'], ['shop/web']]);
	t.is(reflector.items.size, 0);
});

test('changes are not told while the last ones are still being carried out, then all together, also when those failed', async t => {
	const bench = await makeBench(t);
	const {server, client, signal} = bench;
	const sizes: number[] = [];
	let release = () => {};
	const reflector = new Reflector({
		client, path: '/api/v1/pods', transform: readPod, timing: FAST_WATCH, log() {},
		async onChange(keys) {
			sizes.push(keys.size);
			if (sizes.length === 2) {
				await new Promise<void>(resolve => {
					release = resolve;
				});
				throw new Error('it did not work');
			}
		},
	});
	const ended = reflector.run(signal);
	await eventually('it watches', () => server.openWatches === 1);
	server.put('pods', makePod('shop/web-0'));
	await eventually('it is told', () => sizes.length === 2);
	for (let index = 1; index < 50; index++) {
		server.put('pods', makePod(`shop/web-${index}`));
	}

	await eventually('all events are there', () => reflector.counters.events === 50);
	t.deepEqual(sizes, [0, 1]);
	release();
	await eventually('the rest is told', () => sizes.length === 3);
	t.deepEqual(sizes, [0, 1, 49]);
	bench.stop();
	await ended;
});

test('a watch that ends in the regular way goes on at once, without a list', async t => {
	const bench = await makeBench(t);
	const {server, client} = bench;
	const pods = followPods(bench);
	for (let round = 0; round < 3; round++) {
		await untilSteady(bench, pods, round + 1);
		server.put('pods', makePod(`shop/web-${round}`));
		server.endWatches();
	}

	await untilSteady(bench, pods, 4);
	await untilEqual(t, server, pods);
	const {counters} = pods.reflector;
	t.deepEqual([counters.lists, counters.watches, Object.values(counters.errors).reduce((sum, count) => sum + count)], [1, 4, 0]);
	t.true(client.pace.isHealthy);
});

test('caught up is who has listed, or heard a bookmark; not who hears of something that may be old', async t => {
	const bench = await makeBench(t, {server: {bookmarkMs: 1000}});
	const {server} = bench;
	const {reflector} = followPods(bench);
	t.is(reflector.caughtUpMs, undefined);
	await eventually('it watches', () => server.openWatches === 1);
	const listed = reflector.caughtUpMs!;
	t.true(listed > 0);
	for (let index = 0; reflector.counters.events < 3; index++) {
		server.put('pods', makePod('shop/web', {ips: [`10.0.0.${index}`]}));
		await eventually('the event is there', () => reflector.counters.events > index);
		if (reflector.counters.bookmarks === 0) {
			t.is(reflector.caughtUpMs, listed);
			t.true(reflector.lastContactMs! > listed);
		}
	}

	await eventually('a bookmark', () => reflector.counters.bookmarks > 0);
	t.true(reflector.caughtUpMs! > listed);
});

test('watches are asked to last different times, with bookmarks', async t => {
	const bench = await makeBench(t, {server: {secondMs: 1}});
	const {server} = bench;
	followPods(bench, {watchSeconds: 100});
	await eventually('some watches', () => server.requests('/api/v1/pods').filter(({isWatch}) => isWatch).length >= 5);
	const watches = server.requests('/api/v1/pods').filter(({isWatch}) => isWatch).map(({query}) => query);
	const seconds = watches.map(query => Number(query.get('timeoutSeconds')));
	t.true(seconds.every(value => value >= 100 && value <= 200), seconds.join(' '));
	t.true(new Set(seconds).size > 1);
	t.true(watches.every(query => query.get('allowWatchBookmarks') === 'true' && query.get('fieldSelector') === 'spec.nodeName=node-1'));
});

test('a bookmark saves the list when older versions are compacted', async t => {
	const bench = await makeBench(t, {server: {bookmarkMs: 30}});
	const {server} = bench;
	const {reflector} = followPods(bench);
	await eventually('it watches', () => server.openWatches === 1);
	for (let index = 0; index < 5; index++) {
		// Of no interest to this watch, but the version moves on.
		server.put('pods', makePod(`shop/web-${index}`, {nodeName: 'node-2'}));
	}

	const {bookmarks} = reflector.counters;
	await eventually('a bookmark', () => reflector.counters.bookmarks >= bookmarks + 5);
	server.compact();
	server.resetConnections();
	await eventually('it watches again', () => reflector.counters.watches === 2 && server.openWatches === 1);
	t.is(reflector.counters.lists, 1);
	t.is(server.requests('/api/v1/pods').filter(({isWatch}) => isWatch).at(-1)!.query.get('resourceVersion'), String(server.version));
});

test('versions that went back, as after a backup: all is listed again, and what happens from then on is news', async t => {
	const bench = await makeBench(t, {server: {bookmarkMs: 30}});
	const {server} = bench;
	const pods = followPods(bench);
	server.put('pods', makePod('shop/web'));
	await untilEqual(t, server, pods);
	server.restore(10);
	await eventually('listed again', () => pods.reflector.counters.lists === 2);
	server.put('pods', makePod('shop/web', {labels: {version: 'new'}}));
	server.put('pods', makePod('shop/other'));
	await untilEqual(t, server, pods);
	t.regex(pods.reflector.problem ?? '', /versions went back/);
});

test('a watch in which nothing comes, not even a bookmark, is given up, and goes on where it was', async t => {
	const bench = await makeBench(t, {server: {bookmarkMs: 60_000}});
	const {server} = bench;
	const pods = followPods(bench, {inactivityMs: 200});
	await eventually('a second watch', () => pods.reflector.counters.watches >= 2 && server.openWatches === 1);
	server.put('pods', makePod('shop/web'));
	await untilEqual(t, server, pods);
	const {counters} = pods.reflector;
	t.true(counters.errors.timeout >= 1);
	t.is(counters.lists, 1);
});

test.serial('back-off grows up to its bound', async t => {
	withoutJitter(t);
	const [gapMs, maxBackoffMs] = [5, 400];
	const bench = await makeBench(t, {timing: {gapMs, maxBackoffMs}});
	const {server} = bench;
	server.behave({status: 500});
	followPods(bench);
	// Without a bound the last of them would come after more than a minute.
	await eventually('16 requests', () => server.history.length >= 16);
	checkGaps(t, server, 1, index => Math.min(maxBackoffMs, gapMs * 2 ** (index - 1)) / 2);
});

test.serial('back-off starts anew after a steady watch', async t => {
	withoutJitter(t);
	const bench = await makeBench(t, {timing: {gapMs: 5, maxBackoffMs: 3_600_000}});
	const {server} = bench;
	server.behave({status: 500});
	const pods = followPods(bench);
	const {counters} = pods.reflector;
	const failures = () => Object.values(counters.errors).reduce((sum, count) => sum + count);
	await eventually('10 failures', () => failures() >= 10);
	server.behave();
	await untilSteady(bench, pods, 1);
	server.behave({reset: true});
	server.resetConnections();
	const before = failures();
	// Going on where it was, it would take more than a minute.
	await eventually('6 more', () => failures() >= before + 6);
	server.behave();
	await eventually('it watches again', () => server.openWatches === 1);
	t.is(counters.lists, 1);
});

test('old events do not bring back what was deleted, nor replace what is newer', async t => {
	const bench = await makeBench(t);
	const {server} = bench;
	const pods = followPods(bench);
	await eventually('it watches', () => server.openWatches === 1);
	server.behave({repeats: true});
	server.put('pods', makePod('shop/web', {uid: 'a', ips: ['10.0.0.1']}));
	server.put('pods', makePod('shop/gone', {uid: 'b'}));
	server.delete('pods', 'shop/gone');
	server.put('pods', makePod('shop/web', {uid: 'c', ips: ['10.0.0.2']}));
	server.put('pods', makePod('shop/last'));
	await untilEqual(t, server, pods);
	await sleep(50);
	await untilEqual(t, server, pods);
	t.is(pods.reflector.items.get('shop/web')!.uid, 'c');
	t.true(pods.reflector.counters.outdated > 5);
	t.true(pods.told.filter(keys => keys.includes('shop/gone')).length <= 2);
});

test('objects without name or uid are dropped and counted, and what comes after them is read', async t => {
	const bench = await makeBench(t);
	const {server} = bench;
	const garbage = [{metadata: {name: 'no-namespace'}}, {metadata: {name: '', namespace: 'shop'}}] as ApiObject[];
	for (const object of garbage) {
		server.put('pods', {...object, spec: {nodeName: 'node-1'}});
	}

	server.put('pods', makePod('shop/web'));
	const {reflector} = followPods(bench);
	await eventually('it watches', () => server.openWatches === 1);
	t.deepEqual([[...reflector.items.keys()], reflector.counters.dropped], [['shop/web'], 1]);
	server.put('pods', {...garbage[1]!, spec: {nodeName: 'node-1'}});
	server.put('pods', makePod('shop/last'));
	await eventually('the last one is there', () => reflector.items.has('shop/last'));
	t.is(reflector.counters.dropped, 2);
});

test('a list whose pages change meanwhile ends in what is true', async t => {
	const bench = await makeBench(t);
	const {server} = bench;
	for (let index = 0; index < 30; index++) {
		server.put('pods', makePod(`shop/web-${index}`));
	}

	let page = 0;
	server.behave({
		onPage() {
			server.delete('pods', `shop/web-${page}`);
			server.delete('pods', `shop/web-${29 - page}`);
			server.put('pods', makePod(`shop/web-${page}`, {uid: `again-${page}`}));
			server.put('pods', makePod(`shop/more-${page++}`));
		},
	});
	const pods = followPods(bench, {pageSize: 5});
	await eventually('it is synced', () => pods.reflector.isSynced);
	t.true(page >= 5);
	await untilEqual(t, server, pods);
});

test('a list whose pages are each of their own time is mended from its first page\'s version on', async t => {
	const bench = await makeBench(t);
	const {server} = bench;
	for (let index = 10; index < 40; index++) {
		server.put('pods', makePod(`shop/web-${index}`));
	}

	let page = 0;
	server.behave({
		movingPages: true,
		onPage() {
			// On a page that was read before.
			server.delete('pods', `shop/web-1${page}`);
			server.put('pods', makePod(`shop/web-0${page++}`));
		},
	});
	const pods = followPods(bench, {pageSize: 5});
	await untilEqual(t, server, pods);
	t.true(page >= 5);
	t.is(pods.reflector.counters.lists, 1);
});

test('lastContactMs is when the server last said something', async t => {
	const bench = await makeBench(t, {server: {bookmarkMs: 20}});
	const {server} = bench;
	const {reflector} = followPods(bench);
	t.is(reflector.lastContactMs, undefined);
	await eventually('it watches', () => server.openWatches === 1);
	const first = reflector.lastContactMs!;
	t.true(first <= performance.now());
	await eventually('bookmarks count', () => reflector.lastContactMs! > first + 40);
	await server.stop();
	await eventually('the watch has ended', () => reflector.counters.errors.connection > 0);
	const contact = reflector.lastContactMs;
	await sleep(100);
	t.is(reflector.lastContactMs, contact);
	await server.listen();
});

test('when stopped, it ends at once in any state, and is silent', async t => {
	for (const hostility of [{}, {silent: true}, {status: 500}, {closeWatches: true}]) {
		const bench = await makeBench(t, {timing: {requestMs: 10_000, gapMs: 1000, maxBackoffMs: 10_000}});
		const {server} = bench;
		server.behave(hostility);
		const {told, ended} = followPods(bench);
		const namespaces = followNamespaces(bench);
		await sleep(100);
		const started = performance.now();
		bench.stop();
		await Promise.all([ended, namespaces.ended]);
		t.true(performance.now() - started < 5000);
		const before = told.length;
		await eventually('no watch is left', () => server.openWatches === 0);
		server.put('pods', makePod('shop/web'));
		await sleep(20);
		t.is(told.length, before);
	}
});

test('of a pod is kept what the agent needs', t => {
	t.deepEqual(readPod({
		metadata: {
			name: 'web', namespace: 'shop', uid: 'u', resourceVersion: '5', labels: {app: 'web'}, managedFields: [{}], deletionTimestamp: '2026-08-01T00:00:00Z',
			annotations: {'ambient.istio.io/redirection': 'enabled', 'istio.io/reroute-virtual-interfaces': 'x', 'kubectl.kubernetes.io/last-applied-configuration': '{}', 'notistio.io/x': 'y', plain: 'z'},
		},
		spec: {nodeName: 'n', serviceAccountName: 'sa', hostNetwork: true, containers: []},
		status: {phase: 'Running', podIP: '10.0.0.1', podIPs: [{ip: '10.0.0.1'}, {ip: 'fd00::1'}]},
	}), {
		uid: 'u', name: 'web', namespace: 'shop', labels: {app: 'web'}, annotations: {'ambient.istio.io/redirection': 'enabled', 'istio.io/reroute-virtual-interfaces': 'x'},
		nodeName: 'n', phase: 'Running', serviceAccount: 'sa', hostNetwork: true, podIPs: ['10.0.0.1', 'fd00::1'], deletionTimestamp: '2026-08-01T00:00:00Z',
	});
	t.deepEqual(readNamespace({metadata: {name: 'shop', uid: 'u', labels: {a: 'b', bad: 1}}}), {name: 'shop', labels: {a: 'b'}});
	t.deepEqual(readPod({metadata: {name: 'web', namespace: 'shop', uid: 'u'}, status: {podIP: '10.0.0.1'}})!.podIPs, ['10.0.0.1']);
	t.is(keyOf({namespace: 'shop', name: 'web'}), 'shop/web');
	t.is(keyOf({name: 'shop'}), 'shop');
});

test('nothing that a server can send makes them throw', t => {
	const values: readonly unknown[] = [undefined, null, 0, 1, '', 'x', true, [], [null], [[]], {}, {ip: 5}, [{ip: null}], {toString: null}];
	for (const value of values) {
		for (const object of [value, {metadata: value}, {metadata: {name: value, namespace: value, uid: value}}]) {
			t.notThrows(() => [readPod(object), readNamespace(object), readMetadata(object)]);
		}

		const pod = readPod({metadata: {name: 'web', namespace: 'shop', uid: 'u', labels: value, annotations: value, deletionTimestamp: value}, spec: value, status: value});
		t.is(pod?.name, 'web');
		t.true(Array.isArray(readPod({metadata: {name: 'a', namespace: 'b', uid: 'c'}, status: {podIPs: value, podIP: value, phase: value}})!.podIPs));
	}
});
