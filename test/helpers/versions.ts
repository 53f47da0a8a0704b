/** Agents of several versions. */
import {fileURLToPath} from 'node:url';
import type {KubernetesOptions} from '../../src/node/kubernetes.js';
import {ISTIO_DEFAULTS} from '../../src/redirect/annotations.js';
import {NODE, type Cluster} from './cluster.js';
import {Running} from './process.js';
import {Agent, type World} from './world.js';

const CHILD = fileURLToPath(new URL('agent-child.js', import.meta.url));

/** The agent of a version with that layout, ready. It finds the world's pods file. */
export async function startVersion(world: World, layout: number): Promise<Agent> {
	return started(world, layout, world.podsFile, world.node.netns, []);
}

/** The same for a cluster's pods: with short times, or a way in that is not the command line's. */
export async function startNodeVersion(cluster: Cluster, layout: number, options: Partial<KubernetesOptions> = {}): Promise<Agent> {
	const {world, enter} = cluster;
	const pods: KubernetesOptions = {
		...cluster.api.writeCredentials(world.directory), node: NODE, defaults: ISTIO_DEFAULTS, excludeNamespaces: [], zdsSocket: cluster.zdsSocket, ...options,
	};
	return started(world, layout, JSON.stringify(pods), enter.length > 0 ? '/proc/1/ns/net' : world.node.netns, enter);
}

async function started(world: World, layout: number, pods: string, nodeNetns: string, enter: readonly string[]): Promise<Agent> {
	const running = Running.start(world.program('in'), ['--cgroup', world.cgroup, '--', ...enter, process.execPath, CHILD, String(layout), pods, world.bpffs, world.cgroup, nodeNetns]);
	world.onEnd(async () => {
		await running.stop('SIGKILL');
	});
	const agent = new Agent(running);
	await agent.ready();
	return agent;
}
