/** What the agent reports of a pod comes back to it by the watch. */
import test from 'ava';
import {readPod, type PodObject} from '../../src/kubernetes/objects.js';
import {REDIRECTION, type EventWriter, type StatusWriter} from '../../src/kubernetes/status.js';
import {Announcer} from '../../src/node/announcer.js';
import {Locator} from '../../src/node/locator.js';
import {NodePods} from '../../src/node/pods.js';
import type {Round} from '../../src/pods/reconcile.js';
import {ISTIO_DEFAULTS} from '../../src/redirect/annotations.js';
import type {ZdsServer} from '../../src/zds/server.js';
import {eventually} from '../helpers/process.js';
import {makeNamespace, makePod} from '../kubernetes/fake-server.js';
import {makeBench} from '../kubernetes/helpers.js';

const LABELS = {'istio.io/dataplane-mode': 'ambient'};

test('a report that is heard again is no change of the pod, whoever made it', async t => {
	const {server, client, signal, log} = await makeBench(t);
	server.put('namespaces', makeNamespace('shop', {}));
	const put = (annotations: Record<string, string> = {}, labels: Record<string, string> = LABELS) => server.put('pods', makePod('shop/web', {uid: 'u1', nodeName: 'node', labels, annotations}));
	put();
	const pods = new NodePods({
		client, node: 'node', defaults: ISTIO_DEFAULTS, excludeNamespaces: new Set(), locator: new Locator('/proc', () => undefined),
		log(line) {
			log.push(line);
		},
	});
	const heard: string[] = [];
	void pods.run({
		onChange(names) {
			heard.push(`change ${[...names].join()}`);
		},
		onReport(names) {
			heard.push(`report ${[...names].join()} ${pods.pod('shop/web')!.annotations[REDIRECTION]}`);
		},
	}, signal);
	const hears = async (...lines: readonly string[]) => {
		await eventually(lines.join(), () => heard.length >= lines.length);
		t.deepEqual(heard.splice(0), lines);
	};

	await hears('change shop/web');
	put({[REDIRECTION]: 'pending'});
	await hears('report shop/web pending');
	put({[REDIRECTION]: 'enabled'});
	await hears('report shop/web enabled');
	put();
	await hears('report shop/web undefined');
	put({[REDIRECTION]: 'enabled'}, {});
	await hears('change shop/web');
	t.true('leave' in pods.specs.get('shop/web')!.wish);
	put({[REDIRECTION]: 'enabled', 'ambient.istio.io/dns-capture': 'false'}, LABELS);
	await hears('change shop/web');
	put({'ambient.istio.io/dns-capture': 'false'});
	await hears('report shop/web undefined');
});

test('a report that somebody else changed is made again; one of a pod that no round has looked at waits for the round', t => {
	const pod: PodObject = readPod(makePod('shop/web', {uid: 'u1', labels: LABELS}))!;
	const set: unknown[] = [];
	const announcer = new Announcer({
		zds: {has: () => true, remove() {}, state: () => ({kind: 'waiting', why: ''}), connections: []} as unknown as ZdsServer,
		status: {
			set({uid}: PodObject, value: string) {
				set.push([uid, value]);
			},
		} as unknown as StatusWriter,
		events: {report() {}} as unknown as EventWriter,
		pod: name => name === 'shop/web' ? pod : undefined,
		spec: name => ({name, wish: {leave: 'it is not in the mesh'}}),
		namespaceOf: () => undefined,
		modeInKernel: () => undefined,
		log() {},
	});
	announcer.reported(['shop/web', 'shop/gone']);
	t.deepEqual(set, []);
	announcer.round({looked: new Set(['shop/web']), failures: new Map()} as unknown as Round);
	announcer.reported(['shop/web']);
	t.deepEqual(set, [['u1', undefined], ['u1', undefined]]);
});
