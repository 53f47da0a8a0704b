/** The answers to the CNI plugin that depend on what the kernel has. */
import test from 'ava';
import {CniRetry, type CniCall} from '../../src/cni/server.js';
import {cniHandler} from '../../src/node/calls.js';
import type {NodePods} from '../../src/node/pods.js';
import type {NetnsFile} from '../../src/pods/facts.js';
import type {ZdsServer} from '../../src/zds/server.js';

const CALL: CniCall = {netns: '/run/netns/x', podName: 'web', podNamespace: 'shop', podUid: 'u', containerId: 'c', ips: []};
const HERE: NetnsFile = {path: '/run/netns/x', device: 4n, inode: 7n};

/** The handler of a sidecar's pod that the call learned to be at {@link HERE}. */
function handler(captured: NetnsFile | undefined) {
	const pods = {
		isSynced: true,
		call: async () => ({pod: {uid: 'u'}, wish: {capture: {mode: 'sidecar'}, warnings: []}}),
		isAt: (uid: string, {device, inode}: NetnsFile) => uid === 'u' && device === HERE.device && inode === HERE.inode,
	};
	const round = {enrolled: [], failures: new Map(), changes: [], notes: [], namespaces: new Map(), looked: new Set<string>()};
	return cniHandler({pods: pods as unknown as NodePods, zds: {} as ZdsServer, look: () => round, namespaceOf: () => captured});
}

test('a pod starts when it is captured in the namespace that the call named, and not before', async t => {
	const {signal} = new AbortController();
	for (const captured of [undefined, {...HERE, inode: 8n}]) {
		await t.throwsAsync(handler(captured).add(CALL, signal), {instanceOf: CniRetry, message: /it is not captured yet/});
	}

	await t.notThrowsAsync(handler(HERE).add(CALL, signal));
});
