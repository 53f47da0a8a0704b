import test from 'ava';
import {eventually} from '../helpers/process.js';
import {makeNamespace, makePod} from './fake-server.js';
import {followNamespaces, followPods, makeBench, untilEqual} from './helpers.js';

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
