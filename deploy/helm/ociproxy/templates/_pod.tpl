{{- /* The pod, the same for a Deployment and a DaemonSet but for its network and its store. */ -}}
{{- define "ociproxy.pod" -}}
{{- $nodes := include "ociproxy.onNodes" . -}}
metadata:
  labels:
    {{- include "ociproxy.selector" . | nindent 4 }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ include (print $.Template.BasePath "/configmap.yaml") . | sha256sum }}
    {{- if .Values.credentials.create }}
    checksum/credentials: {{ include (print $.Template.BasePath "/secret.yaml") . | sha256sum }}
    {{- end }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "ociproxy.serviceAccountName" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- if $nodes }}
  hostNetwork: true
  {{- end }}
  dnsPolicy: {{ .Values.dnsPolicy | default (ternary "Default" "ClusterFirst" (not (empty $nodes))) }}
  {{- with .Values.priorityClassName | default (ternary "system-node-critical" "" (not (empty $nodes))) }}
  priorityClassName: {{ . }}
  {{- end }}
  terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds }}
  securityContext:
    {{- toYaml .Values.podSecurityContext | nindent 4 }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $nodes }}
  initContainers:
    # The kubelet makes the folder for root.
    - name: owner
      image: {{ include "ociproxy.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [chown, "{{ int .Values.podSecurityContext.runAsUser }}:{{ int .Values.podSecurityContext.runAsGroup }}", /var/lib/ociproxy]
      securityContext:
        runAsNonRoot: false
        runAsUser: 0
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL], add: [CHOWN]}
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      volumeMounts:
        - {name: store, mountPath: /var/lib/ociproxy}
    {{- if .Values.nodeConfig.enabled }}
    # Below /node only certs.d is the node's; what else the command writes goes with the pod.
    - name: node-config
      image: {{ include "ociproxy.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command:
        - ociproxy
        - client-config
        - containerd
        - --mirror
        - {{ ternary "https" "http" (not (empty .Values.tls.existingSecret)) }}://127.0.0.1:{{ int .Values.port }}
        - --write
        - /node
      securityContext:
        runAsNonRoot: false
        runAsUser: 0
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]}
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      volumeMounts:
        - {name: node, mountPath: /node}
        - {name: certs-d, mountPath: /node/etc/containerd/certs.d}
    {{- end }}
  {{- end }}
  containers:
    - name: ociproxy
      image: {{ include "ociproxy.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [ociproxy]
      args:
        - serve
        - --config-path
        - /etc/ociproxy/config/ociproxy.yaml
        {{- range .Values.extraArgs }}
        - {{ . | quote }}
        {{- end }}
      {{- with .Values.env }}
      env:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - name: registry
          containerPort: {{ int .Values.port }}
          protocol: TCP
        {{- if .Values.admin.enabled }}
        - name: admin
          containerPort: {{ int .Values.admin.port }}
          protocol: TCP
        {{- end }}
      startupProbe:
        {{- include "ociproxy.probe" (dict "root" . "path" "/healthz") | nindent 8 }}
        periodSeconds: 2
        failureThreshold: 30
      livenessProbe:
        {{- include "ociproxy.probe" (dict "root" . "path" "/healthz") | nindent 8 }}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      readinessProbe:
        {{- include "ociproxy.probe" (dict "root" . "path" "/readyz") | nindent 8 }}
        periodSeconds: 5
        # The server itself waits for a slow disk for 5 s.
        timeoutSeconds: 6
        failureThreshold: 2
      securityContext:
        {{- toYaml .Values.securityContext | nindent 8 }}
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      volumeMounts:
        - {name: store, mountPath: /var/lib/ociproxy}
        - {name: tmp, mountPath: /tmp}
        - {name: config, mountPath: /etc/ociproxy/config, readOnly: true}
        {{- if or .Values.credentials.create .Values.credentials.existingSecrets }}
        - {name: credentials, mountPath: /etc/ociproxy/credentials, readOnly: true}
        {{- end }}
        {{- if .Values.tls.existingSecret }}
        - {name: tls, mountPath: /etc/ociproxy/tls, readOnly: true}
        {{- end }}
        {{- if .Values.users.existingSecret }}
        - {name: users, mountPath: /etc/ociproxy/users, readOnly: true}
        {{- end }}
        {{- with .Values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: store
      {{- if $nodes }}
      hostPath: {path: {{ .Values.hostPath }}, type: DirectoryOrCreate}
      {{- else if .Values.persistence.enabled }}
      persistentVolumeClaim: {claimName: {{ .Values.persistence.existingClaim | default (include "ociproxy.fullname" .) }}}
      {{- else }}
      emptyDir: {sizeLimit: {{ .Values.persistence.size }}}
      {{- end }}
    - name: tmp
      emptyDir: {sizeLimit: 1Gi}
    - name: config
      configMap: {name: {{ include "ociproxy.fullname" . }}}
    {{- if or .Values.credentials.create .Values.credentials.existingSecrets }}
    - name: credentials
      projected:
        defaultMode: 0440
        sources:
          {{- range .Values.credentials.existingSecrets }}
          - secret: {name: {{ . }}}
          {{- end }}
          {{- if .Values.credentials.create }}
          - secret: {name: {{ include "ociproxy.fullname" . }}}
          {{- end }}
    {{- end }}
    {{- with .Values.tls.existingSecret }}
    - name: tls
      secret: {secretName: {{ . }}, defaultMode: 0440}
    {{- end }}
    {{- with .Values.users }}
    {{- if .existingSecret }}
    - name: users
      secret: {secretName: {{ .existingSecret }}, defaultMode: 0440, items: [{key: {{ .key }}, path: htpasswd}]}
    {{- end }}
    {{- end }}
    {{- if and $nodes .Values.nodeConfig.enabled }}
    - name: node
      emptyDir: {sizeLimit: 1Mi}
    - name: certs-d
      hostPath: {path: {{ .Values.nodeConfig.certsD }}, type: DirectoryOrCreate}
    {{- end }}
    {{- with .Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if not (kindIs "invalid" .Values.tolerations) }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- else if $nodes }}
  tolerations:
    - operator: Exists
  {{- end }}
{{- end }}
