/** agent-child LAYOUT PODS BPFFS CGROUP NODE_NETNS: the agent of a version with that layout. PODS is a file, or {@link KubernetesOptions} as JSON. */
import {runAgent} from '../../src/agent.js';
import type {KubernetesOptions} from '../../src/node/kubernetes.js';
import {OBJECTS, TEST_MIGRATIONS} from './layouts.js';

const [layout, pods, bpffs, cgroup, nodeNetns] = process.argv.slice(2) as [string, string, string, string, string];
const stop = new AbortController();
process.once('SIGTERM', () => {
	stop.abort();
});
await runAgent({
	pods: pods.startsWith('{') ? JSON.parse(pods) as KubernetesOptions : {file: pods}, bpffs, cgroup, nodeNetns,
	proc: '/proc',
	metrics: {host: '127.0.0.1', port: 0},
	maxPods: 1024,
	resetOlder: false,
	build: {object: OBJECTS[Number(layout)]!, migrations: TEST_MIGRATIONS},
	log(line) {
		process.stderr.write(`${line}\n`);
	},
	signal: stop.signal,
});
